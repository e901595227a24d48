"""The inputs of both sides: random weights, a training batch, prompts and conditions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.beside_torch.sizes import Size
from benchmarks.beside_torch.weights import drawn_ahead, drawn_leaf, random_params
from dreamllm_jax.batch import Batch
from dreamllm_jax.data.tokenizer import SpecialTokens
from dreamllm_jax.models.parameters import abstract_params

SPECIAL = SpecialTokens(
    bos=1,
    eos=2,
    unk=0,
    pad=3,
    im_start=4,
    im_end=5,
    im_patch=6,
    dream_start=7,
    dream_end=8,
    image=9,
    dream=10,
)
FIRST_TEXT_TOKEN = 11


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs for one size, all from fixed seeds.

    `on_device` says that the weights are drawn there, each time that they are asked for: nothing is kept.
    """

    size: Size
    on_device: bool = False

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """The weights on the host, float32."""
        return random_params(self.size.model)

    def weights(self, dtype: Callable[[str], str]) -> dict[str, Any]:
        """Returns all weights by path: drawn on the device in the dtype of each, or float32 on the host."""
        if not self.on_device:
            return dict(self.params)
        shapes = {path: x.shape for path, x in abstract_params(self.size.model).items()}
        return dict(drawn_ahead(shapes, lambda path: drawn_leaf(path, shapes[path], dtype(path))))

    def leaves(self, paths: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yields the float32 weights of these paths one after the other."""
        if not self.on_device:
            yield from ((path, self.params[path]) for path in paths)
            return
        shapes = {path: x.shape for path, x in abstract_params(self.size.model).items()}
        yield from drawn_ahead(paths, lambda path: drawn_leaf(path, shapes[path]))

    def text_tokens(self, rows: int, length: int, seed: int) -> np.ndarray:
        """Returns random text tokens (no control tokens), int32 [rows, length]."""
        assert self.size.model.llama is not None
        rng = np.random.default_rng(seed)
        return rng.integers(FIRST_TEXT_TOKEN, self.size.model.llama.vocab_size, (rows, length)).astype(
            np.int32
        )

    def prompts(self, rows: int) -> Batch:
        """Returns a batch of prompts of `size.prompt` tokens, without padding."""
        tokens = self.text_tokens(rows, self.size.prompt, seed=1)
        return _rows(tokens, np.full_like(tokens, -1), np.full_like(tokens, -1))

    @functools.cached_property
    def training_batch(self) -> Batch:
        """A batch of full rows with one document each: an image to read, text, an image to generate."""
        size, model = self.size, self.size.model
        assert model.vision is not None
        rows, patches, queries = size.rows, model.num_patches, model.num_dream_queries
        tokens = self.text_tokens(rows, size.length, seed=2)
        images, dreams = np.full_like(tokens, -1), np.full_like(tokens, -1)
        first, last = 2, size.length - queries - 2
        assert first + patches + 1 < last, "size.length is too short for two images"
        tokens[:, 0], tokens[:, 1], tokens[:, first + patches] = SPECIAL.bos, SPECIAL.im_start, SPECIAL.im_end
        tokens[:, first : first + patches] = SPECIAL.im_patch
        images[:, first : first + patches] = np.arange(patches)
        tokens[:, last - 1], tokens[:, last : last + queries] = SPECIAL.dream_start, SPECIAL.dream
        dreams[:, last : last + queries] = np.arange(queries)
        tokens[:, -2], tokens[:, -1] = SPECIAL.dream_end, SPECIAL.eos
        rng = np.random.default_rng(3)
        image_size, dream_size = model.vision.image_size, model.image_size
        return dataclasses.replace(
            _rows(tokens, images, dreams),
            images=rng.integers(0, 256, (rows, 1, image_size, image_size, 3)).astype(np.uint8),
            dream_images=rng.integers(0, 256, (rows, 1, dream_size, dream_size, 3)).astype(np.uint8),
            image_mask=np.ones((rows, 1), bool),
            dream_mask=np.ones((rows, 1), bool),
        )

    def conditions(self, num_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns random U-Net contexts [num_images, Q, X], and that of the empty prompt [1, Q, X]."""
        model = self.size.model
        assert model.unet is not None
        shape = (model.num_dream_queries, model.unet.cross_attention_dim)
        rng = np.random.default_rng(4)
        return rng.standard_normal((num_images, *shape), np.float32), rng.standard_normal(
            (1, *shape), np.float32
        )


def _rows(tokens: np.ndarray, image_slots: np.ndarray, dream_slots: np.ndarray) -> Batch:
    """Returns a batch with one document in each row; the loss is on text, <dream> and the end."""
    rows, length = tokens.shape
    targets = np.concatenate([tokens[:, 1:], np.full((rows, 1), -1, np.int32)], axis=1)
    text = (targets >= FIRST_TEXT_TOKEN) | (targets == SPECIAL.dream_start) | (targets == SPECIAL.eos)
    return Batch(
        tokens=tokens,
        targets=np.where(text, targets, 0),
        segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        loss_weights=text.astype(np.float32),
        image_slots=image_slots,
        dream_slots=dream_slots,
        image_mask=np.zeros((rows, 1), bool),
        dream_mask=np.zeros((rows, 1), bool),
        null_dream=np.full((rows,), -1, np.int32),
        segment_lengths=np.full((rows, 1), length, np.int32),
    )
