"""`Batch`, the input of a train step, and the letters of all axes.

Signatures, einsums and comments of the project use one alphabet:

    B rows            L length           D LLM width       V vocabulary
    N query heads     K key/value heads  H head width      F MLP width
    I images per row  J dreams per row   P patches/image   Q dream queries
    X condition width T diffusion steps  S cache length    E vision width
    M segments per row, at most
    h w c             pixels and latents, always channels-last
"""

from __future__ import annotations

import typing
from typing import Any

import flax.struct
from jaxtyping import Bool, Float, Int, Num


# Any: arrays are numpy's on a host and JAX's on devices; shapes and shardings travel in this container too.
@typing.no_type_check
@flax.struct.dataclass
class Batch:
    """Rows of fixed length with fixed numbers of images. Every array is sharded along its first axis.

    Several documents share a row. `segment_ids` numbers them from 1 (0 is padding), `positions` restart at 0
    in each, and attention never crosses them. `targets[b, l]` is the token that follows position l; its loss
    has the weight `loss_weights[b, l]`. Images are inserted by a gather within the row: `image_slots` is `k *
    P + p` for patch p of the row's k-th image, `dream_slots` is `k * Q + q` for query q of the row's k-th
    dream, and both are -1 elsewhere. A row of 12 positions with two documents, P = 2 patches and Q = 2
    queries:

        tokens        <s>  a  <im> im im </im> </s> <s> <dream> dr dr </dream>
        segment_ids    1   1   1   1  1   1     1    2    2     2  2    2
        positions      0   1   2   3  4   5     6    0    1     2  3    4
        image_slots   -1  -1  -1   0  1  -1    -1   -1   -1    -1 -1   -1
        dream_slots   -1  -1  -1  -1 -1  -1    -1   -1   -1     0  1   -1

    `null_dream` is the index of the row's dream for the empty prompt, `<s><dream> dr dr </dream>`, whose
    condition replaces a dropped one; -1 if the row has none. In the row above it is 0.

    `dream_sizes` has SDXL's size conditions of each dream, in pixels: original height and width, crop top and
    left, target height and width. A field that a model does not use may be None.

    `segment_lengths` has the lengths of segments 1, 2, ..., which lie one after another from position 0, and
    zeros after the last; in the row above [7, 5, 0, ...]. GPUs' attention over packed rows needs it: without
    it, a mask of every query and key is in memory.

    Images are uint8. Floating-point images are taken as pixels that are already normalized for their tower.
    """

    tokens: Int[Any, "B L"]
    targets: Int[Any, "B L"]
    segment_ids: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    loss_weights: Float[Any, "B L"]
    image_slots: Int[Any, "B L"]
    dream_slots: Int[Any, "B L"]
    image_mask: Bool[Any, "B I"]
    dream_mask: Bool[Any, "B J"]
    null_dream: Int[Any, "B"]
    images: Num[Any, "B I h w 3"] | None = None
    dream_images: Num[Any, "B J h2 w2 3"] | None = None
    dream_sizes: Int[Any, "B J 6"] | None = None
    segment_lengths: Int[Any, "B M"] | None = None
