"""DreamLLM: a language model that reads images through a vision tower and draws them with a frozen U-Net.

This is the composition of arXiv 2309.11499, section 3. Images enter the language model as projected patch
features in their slots. Learned dream queries, in slots of their own, ask for an image: the final states at
these slots, projected, are the cross-attention context of the U-Net. Any tower may be absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.models.clip import ClipText, ClipVision, ContrastiveHead, normalize_pixels
from dreamllm_jax.models.connectors import DreamQueries, GlobalProjector, Projector
from dreamllm_jax.models.kv_cache import KVCache
from dreamllm_jax.models.llama import Llama
from dreamllm_jax.models.unet import UNet
from dreamllm_jax.models.vae import Vae, diffusion_pixels, to_uint8
from dreamllm_jax.sharding import constrain


class DreamLLMModule(nn.Module):
    """The towers and connectors of `config`. Every method is pure, for `apply(..., method=DreamLLMModule.x)`.

    `tables_gathered` says that the embedding table and the output head are already gathered along fsdp.
    `layered` says that the language model's parameters are in the layout of generation (see `Llama`).
    """

    config: DreamLLMConfig
    tables_gathered: bool = False
    layered: bool = False

    if TYPE_CHECKING:  # flax declares a union that no caller can use; the result is that of `method`

        def apply(self, variables: Any, *args: Any, method: Any = None, **options: Any) -> Any: ...

    def setup(self):
        c = self.config
        dtype, scan = jnp.dtype(c.dtype), c.scan_layers
        if c.llama is not None:
            self.llama = Llama(
                c.llama, dtype, c.remat.llama, c.attention.llama, self.tables_gathered, self.layered, scan
            )
        if c.vision is not None:
            self.vision = ClipVision(c.vision, dtype, c.remat.vision, c.attention.vision, scan)
        if c.llama is not None and c.vision is not None:
            small = nn.initializers.normal(c.llama.initializer_range)
            self.vision_projector = Projector(
                c.vision_projector, c.llama.hidden_size, dtype=dtype, kernel_init=small
            )
        if c.unet is not None:
            assert c.vae is not None
            self.unet = UNet(c.unet, dtype, c.remat.unet, c.attention.unet, scan)
            self.vae = Vae(c.vae, dtype, c.attention.vae)
        if c.llama is not None and c.unet is not None:
            self.dream_queries = DreamQueries(c.num_dream_queries, c.llama.hidden_size, dtype=dtype)
            self.condition_projector = Projector(
                c.condition_projector, c.unet.cross_attention_dim, dtype=dtype
            )
            if c.unet.pooled_text_dim is not None:
                self.global_projector = GlobalProjector(c.unet.pooled_text_dim, dtype=dtype)
        if c.text is not None:
            self.text = ClipText(c.text, dtype, c.remat.vision, scan)
        if c.contrastive:
            assert c.text is not None
            self.contrastive = ContrastiveHead(c.text.projection_dim, dtype=dtype)

    # Reading

    def see(self, images: Num[Array, "*M h w 3"]) -> Float[Array, "*M P D"]:
        """Returns the features of images that the language model reads: projected patch states.

        uint8 images are normalized here; floats must be CLIP's normalized pixels already. The states are
        those of `config.vision_select_layer` without the class token.
        """
        leading = images.shape[:-3]
        images = images.reshape(-1, *images.shape[-3:])
        pixels = normalize_pixels(images) if images.dtype == jnp.uint8 else images
        states = self.vision(pixels, select_layer=self.config.vision_select_layer)[:, 1:]
        features = self.vision_projector(states)
        return features.reshape(*leading, *features.shape[1:])

    def embed_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the embeddings of token ids."""
        return self.llama.embed(tokens)

    def queries(self) -> Float[Array, "Q D"]:
        """Returns the dream queries, which are embeddings."""
        return self.dream_queries()

    def embed(self, batch: Batch) -> Float[Array, "B L D"]:
        """Returns token embeddings, with patch features and dream queries in their slots."""
        embeds = self.llama.embed(batch.tokens)
        if self.config.sees and batch.images is not None and batch.images.shape[1]:
            features = self.see(batch.images)
            features = features.reshape(features.shape[0], -1, features.shape[-1])
            embeds = fill_slots(embeds, features, batch.image_slots)
        if self.config.draws:
            queries = self.dream_queries()[batch.dream_slots % self.config.num_dream_queries]
            embeds = jnp.where((batch.dream_slots >= 0)[..., None], queries.astype(embeds.dtype), embeds)
        return constrain(embeds, "batch", "length", "embed")

    def read(self, batch: Batch) -> Float[Array, "B L D"]:
        """Returns the final hidden states of packed rows."""
        return self.llama(self.embed(batch), batch.positions, batch.segment_ids, batch.segment_lengths)

    def prefill(
        self, embeds: Float[Array, "B L D"], lengths: Int[Array, "B"], cache: KVCache
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        """Fills an empty cache with left-aligned rows (see `Llama.prefill`)."""
        return self.llama.prefill(embeds, lengths, cache)

    def extend(
        self, embeds: Float[Array, "B L D"], valid: Bool[Array, "B L"], cache: KVCache
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        """Appends the valid embeddings of each row to its cache (see `Llama.extend`)."""
        return self.llama.extend(embeds, valid, cache)

    def head(self) -> Float[Array, "D V"]:
        """Returns the matrix from hidden states to logits."""
        return self.llama.head()

    def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns next-token logits in float32."""
        return self.llama.logits(hidden)

    # Drawing

    def conditions(
        self, queries: Float[Array, "*M Q D"]
    ) -> tuple[Float[Array, "*M Q X"], Float[Array, "*M G"] | None]:
        """Returns the U-Net's context and, for SDXL, its pooled condition, from states at query slots."""
        pooled = None
        if self.config.unet is not None and self.config.unet.pooled_text_dim is not None:
            pooled = self.global_projector(queries)
        return self.condition_projector(queries), pooled

    def denoise(
        self,
        latents: Float[Array, "M h w c"],
        timesteps: Array,
        context: Float[Array, "M S X"],
        added: dict[str, Array] | None = None,
    ) -> Float[Array, "M h w c"]:
        """Returns the U-Net's prediction (see `UNet`)."""
        return self.unet(latents, timesteps, context, added)

    def encode_image(self, images: Num[Array, "M h w 3"]) -> Float[Array, "M h2 w2 c"]:
        """Returns the VAE's moments of images: mean and log-variance, concatenated along channels.

        uint8 images are normalized here; floats must be pixels in [-1, 1] already.
        """
        return self.vae.encode(diffusion_pixels(images) if images.dtype == jnp.uint8 else images)

    def decode_image(self, latents: Float[Array, "M h w c"]) -> UInt8[Array, "M h2 w2 3"]:
        """Returns the uint8 images of scaled latents."""
        assert self.config.vae is not None
        return to_uint8(self.vae.decode(latents / self.config.vae.scaling_factor))

    # Stage 0: pretraining of the towers, which the published system downloads

    def reconstruct(
        self, images: UInt8[Array, "M h w 3"], noise: Float[Array, "M h2 w2 c"]
    ) -> tuple[Array, Array, Array, Array]:
        """Encodes and decodes images. Returns (pixels, reconstruction, mean, log-variance)."""
        pixels = diffusion_pixels(images)
        mean, logvar = jnp.split(self.vae.encode(pixels), 2, axis=-1)
        return pixels, self.vae.decode(mean + jnp.exp(0.5 * logvar) * noise), mean, logvar

    def read_caption(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L X"]:
        """Returns the states of the text tower: the context with which the U-Net is pretrained."""
        return self.text(tokens)[0]

    def contrast(
        self, images: UInt8[Array, "B h w 3"], tokens: Int[Array, "B L"]
    ) -> tuple[Array, Array, Array]:
        """Returns CLIP's normalized image and text embeddings, and the inverse temperature."""
        return self.contrastive(self.vision.pooled(normalize_pixels(images)), self.text(tokens)[1])

    def call_every_tower(self, batch: Batch, caption: Int[Array, "B S"]) -> None:
        """Calls every tower and connector once, so that `init` creates all parameters."""
        c = self.config
        if c.llama is not None:
            self.logits(self.read(batch))
        if c.draws:
            assert c.llama is not None
            self.conditions(jnp.zeros((1, c.num_dream_queries, c.llama.hidden_size)))
        if c.vision is not None:
            size = c.vision.image_size
            images = jnp.zeros((1, size, size, 3), jnp.uint8)
            self.vision.pooled(normalize_pixels(images))
        if c.unet is not None and c.vae is not None:
            size = c.vae.downscale * 2 ** len(c.unet.block_out_channels)
            zeros = jnp.zeros((1, size, size, 3), jnp.uint8)
            mean = jnp.split(self.encode_image(zeros), 2, axis=-1)[0]
            self.decode_image(mean)
            added = None
            if c.unet.pooled_text_dim is not None:
                added = {"text_embeds": jnp.zeros((1, c.unet.pooled_text_dim)), "time_ids": jnp.zeros((1, 6))}
            context = jnp.zeros((1, 2, c.unet.cross_attention_dim))
            self.denoise(mean, jnp.zeros((1,), jnp.int32), context, added)
        if c.text is not None:
            states = self.text(caption)
            if c.contrastive:
                self.contrastive(self.vision.pooled(normalize_pixels(images)), states[1])


def fill_slots(
    embeds: Float[Array, "B L D"], features: Float[Array, "B M D"], slots: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Returns the embeddings with feature `slots[b, l]` of row b at position l; -1 keeps the embedding.

    Example: a row with one image of 4 patches (features f0 to f3) between text tokens.

        slots    -1  0  1  2  3 -1
        embeds   e0 e1 e2 e3 e4 e5
        result   e0 f0 f1 f2 f3 e5
    """
    taken = jnp.take_along_axis(features, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots >= 0)[..., None], taken.astype(embeds.dtype), embeds)


def query_states(
    hidden: Float[Array, "B L D"], dream_slots: Int[Array, "B L"], dreams: int, queries: int
) -> Float[Array, "B J Q D"]:
    """Returns the states at the query slots of every dream; zeros where a row has fewer dreams.

    Example: `dreams=2` dreams of `queries=2` queries each, in a row that contains only the first dream. h0 to
    h4 are the hidden states.

        dream_slots   -1 -1  0  1 -1
        hidden        h0 h1 h2 h3 h4
        result        [[h2, h3], [0, 0]]
    """
    rows, length = dream_slots.shape
    slots = jnp.where(dream_slots >= 0, dream_slots, dreams * queries)
    positions = jnp.full((rows, dreams * queries), length, jnp.int32)
    positions = positions.at[jnp.arange(rows)[:, None], slots].set(jnp.arange(length), mode="drop")
    states = jnp.take_along_axis(hidden, positions[..., None], axis=1, mode="fill", fill_value=0)
    return states.reshape(rows, dreams, queries, hidden.shape[-1])
