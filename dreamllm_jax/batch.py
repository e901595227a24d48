"""The letters of every axis, and the static batch.

One alphabet serves every signature, einsum and comment of the project:

    B rows            L length           D LLM width       V vocabulary
    N query heads     K key/value heads  H head width      F MLP width
    I images per row  J dreams per row   P patches/image   Q dream queries
    X condition width T diffusion steps  S cache length    E vision width
    h w c             pixels and latents, always channels-last
"""

from __future__ import annotations

import typing

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Num


@typing.no_type_check  # shapes and shardings travel in the same container
@flax.struct.dataclass
class Batch:
    """Rows of fixed length with fixed image budgets; every array shards on its first axis.

    Several documents share a row: `segment_ids` counts them from 1 (0 is padding), `positions`
    restart at 0 in each, attention never crosses them. Images enter by a gather within the row:
    `image_slots` is -1, or `k * P + p` for patch p of the row's k-th image; `dream_slots` is -1,
    or `k * Q + q` for query q of the row's k-th dream. `targets[b, l]` is the token that follows
    position l, counted with `loss_weights[b, l]`.

    `null_dream` names, per row, the dream of the empty prompt (`<s><dream_start> Q <dream_end>`),
    whose state replaces a dropped condition; -1 where the row has none.

    `dream_sizes` are SDXL's size conditions of each dream: original height and width, crop top and
    left, target height and width, in pixels. A field without use in a model may be None.

    Pictures are bytes; floats are taken as pixels normalized for their tower.
    """

    tokens: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    loss_weights: Float[Array, "B L"]
    image_slots: Int[Array, "B L"]
    dream_slots: Int[Array, "B L"]
    image_mask: Bool[Array, "B I"]
    dream_mask: Bool[Array, "B J"]
    null_dream: Int[Array, "B"]
    images: Num[Array, "B I h w 3"] | None = None
    dream_images: Num[Array, "B J h2 w2 3"] | None = None
    dream_sizes: Int[Array, "B J 6"] | None = None
