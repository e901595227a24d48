"""The document loop: the model writes, decides to draw, draws, sees its drawing, and writes on.

Text is decoded until `<dream_start>` or `</s>`. At `<dream_start>` the dream queries are appended, and their
final states condition an image. The model then reads `<dream_end> <im_start>`, the image as its vision tower
sees it, and `<im_end>`, and goes on decoding. Only `<dream_start>` is the model's own choice (arXiv
2309.11499, section 3.3); the other tokens are forced. All rows of a batch go through the loop together. A
document with two images, where | ends a decoded text and everything in brackets is forced:

    Count from one to two. one | [Q dream queries] [<dream_end> <im_start> P patches <im_end>] two | [...]
    </s>
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.distributed import to_host
from dreamllm_jax.document import Document
from dreamllm_jax.generate.decode import DecodeState, append_image, decode_text, dream
from dreamllm_jax.generate.engine import Engine
from dreamllm_jax.generate.images import UnconditionalState, draw_in_batches
from dreamllm_jax.generate.prompts import cache_capacity, end_tokens, longest_prompt


def image_block_length(engine: Engine) -> int:
    """Returns the number of tokens of one image, dreamed and seen, with its markers."""
    config = engine.config
    return config.num_dream_queries + 2 + (config.num_patches + 2 if config.sees else 0)


def write_documents(
    engine: Engine,
    batch: Batch,
    keys: jax.Array,
    settings: GenerationConfig,
    unconditional: UnconditionalState | None,
) -> list[Document]:
    """Returns the documents that continue the prompts of `batch`, one per row, without the prompts.

    `settings.max_new_tokens` limits the text of a document, `settings.max_images` its images.
    """
    block, max_new_tokens = image_block_length(engine), settings.max_new_tokens
    room = cache_capacity(
        longest_prompt(batch) + max_new_tokens + settings.max_images * block, engine.config.context_length
    )
    state = engine.read(batch, room)
    rows = batch.tokens.shape[0]
    parts: list[list[str | Image.Image]] = [[] for _ in range(rows)]
    drawn, written = np.zeros(rows, int), np.zeros(rows, int)
    active, reason = np.ones(rows, bool), np.full(rows, "length", object)
    special, ends = engine.tokenizer.special, end_tokens(engine.tokenizer, settings.template)
    while active.any():
        control = engine.control(
            stops=[*ends, special.dream_start] if engine.config.draws else ends,
            may_dream=active & (drawn < settings.max_images) & engine.config.draws,
            dream_room=block,
            settings=settings,
        )
        state, tokens, stop = decode_text(
            engine.params,
            state,
            jnp.asarray(active),
            jnp.asarray(max_new_tokens - written, jnp.int32),
            keys,
            control,
            model=engine.module,
            max_new_tokens=max_new_tokens,
        )
        tokens, stop = to_host(tokens), to_host(stop)
        for row in np.flatnonzero(active):
            ids = tokens[row][tokens[row] >= 0].tolist()
            written[row] += len(ids)
            if text := engine.tokenizer.decode(ids).strip():
                parts[row].append(text)
        reason[active & np.isin(stop, ends)] = "stop"
        active &= stop == special.dream_start
        if active.any():
            state, images = draw_and_append(engine, state, active, keys, settings, unconditional)
            for row, image in images.items():
                parts[row].append(Image.fromarray(image))
                drawn[row] += 1
    return [Document(p, finish_reason=str(r)) for p, r in zip(parts, reason, strict=True)]


def draw_and_append(
    engine: Engine,
    state: DecodeState,
    active: np.ndarray,
    keys: jax.Array,
    settings: GenerationConfig,
    unconditional: UnconditionalState | None,
) -> tuple[DecodeState, dict[int, np.ndarray]]:
    """Draws one image in each active row and appends it there. Returns the images by row."""
    special = engine.tokenizer.special
    row_keys = jax.vmap(jax.random.fold_in)(keys, state.cache.lengths)
    mask = jnp.asarray(active)
    start = jnp.int32(special.dream_start)
    state, context, pooled = dream(engine.params, state, mask, start, model=engine.module)
    picked = np.flatnonzero(active)
    images = draw_in_batches(engine, (context, pooled), picked, row_keys[picked], settings, unconditional)
    size = images.shape[1]
    seen, before, after = None, [special.dream_end], []
    if engine.config.sees:
        seen = np.zeros((len(active), size, size, 3), np.uint8)
        seen[picked] = images
        seen = engine.to_vision_input(seen)
        before, after = [special.dream_end, special.im_start], [special.im_end]
    tokens = (jnp.asarray(before, jnp.int32), jnp.asarray(after, jnp.int32))
    state = append_image(engine.params, state, mask, seen, *tokens, model=engine.module)
    return state, dict(zip(picked.tolist(), images, strict=True))
