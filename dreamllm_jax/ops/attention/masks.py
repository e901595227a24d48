"""Attention masks as rules. Kernels evaluate the rule; the reference turns it into an array of booleans.

The array [B, 1, L, S] grows with the square of the length, the rule does not.
"""

from __future__ import annotations

import functools
import operator
import typing

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@typing.no_type_check  # instances also hold shardings and axes in place of the arrays
@flax.struct.dataclass
class Mask:
    """The conditions under which a query attends to a key. All that are given must hold.

    causal           query i attends to keys 0 to i; there must be as many queries as keys
    segment_ids      a query attends to keys of its own segment; 0 (padding) is a segment like any other
    key_segment_ids  the segments of the keys, where they differ from those of the queries
    key_lengths      a query attends to the first `key_lengths` keys only, such as the entries of a cache

    `segment_lengths` hides nothing more: it says that segments 1, 2, ... have these lengths (0: there is
    none) and lie one after another from position 0, so that only segment 0 follows. With it, cuDNN needs no
    array of queries and keys.
    """

    segment_ids: Int[Array, "B L"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    key_lengths: Int[Array, "#B #L"] | None = None
    segment_lengths: Int[Array, "B M"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def may_hide_all_keys(self) -> bool:
        """Returns whether there may be a query that attends to no key."""
        return self.key_segment_ids is not None or self.key_lengths is not None

    def per_query(self, queries: int) -> Mask:
        """Returns the same rule without `causal`, so that it still holds for a part of the queries.

        Causality becomes a key length of i + 1 for query i.
        """
        if not self.causal and (self.segment_ids is None or self.key_segment_ids is not None):
            return self
        lengths = self.key_lengths
        if self.causal:
            causal_lengths = jnp.arange(1, queries + 1, dtype=jnp.int32)[None]
            lengths = causal_lengths if lengths is None else jnp.minimum(causal_lengths, lengths)
        keys = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
        return Mask(self.segment_ids, keys, lengths)


def packed(segment_ids: Int[Array, "B L"], segment_lengths: Int[Array, "B M"] | None = None) -> Mask:
    """Returns the mask of packed rows: a position attends to itself and to earlier ones of its segment.

    `segment_lengths` are those of the segments from 1 on, if they lie one after another (see `Mask`).

    Example: a row of a document of 2 tokens, another of 3, and one position of padding,
    `packed([[1, 1, 2, 2, 2, 0]], [[2, 3, 0, 0]])`. A 1 stands where the query (row) attends to the key
    (column).

        segment   1 1 2 2 2 0
              1   1 . . . . .
              1   1 1 . . . .
              2   . . 1 . . .
              2   . . 1 1 . .
              2   . . 1 1 1 .
              0   . . . . . 1
    """
    return Mask(segment_ids, segment_lengths=segment_lengths, causal=True)


def cached(positions: Int[Array, "B L"], valid: Bool[Array, "B L"]) -> Mask:
    """Returns the mask of new tokens on a cache: a valid one at position p attends to entries 0 to p.

    A token that is not valid attends to nothing. Example: a cache with room for 6 entries holds 2; three
    tokens are appended, of which the last is not valid: `cached([[2, 3, 3]], [[True, True, False]])`.

        position   entry 0 1 2 3 4 5
               2         1 1 1 . . .
               3         1 1 1 1 . .
               -         . . . . . .
    """
    return Mask(key_lengths=jnp.where(valid, positions + 1, 0))


def boolean_mask(mask: Mask | None, queries: int, keys: int) -> Bool[Array, "#B 1 L S"] | None:
    """Returns the rule as booleans, true where a query attends to a key; None where nothing is hidden.

    Raises:
      ValueError: the rule is causal and the numbers of queries and keys differ.
    """
    if mask is None:
        return None
    conditions = []
    if mask.causal:
        if queries != keys:
            raise ValueError(
                f"A causal mask was given {queries} queries and {keys} keys; it needs as many keys as "
                "queries. For a cache, use key_lengths."
            )
        positions = jnp.arange(queries)
        conditions.append(positions[None, :, None] >= positions)
    if mask.segment_ids is not None:
        key_ids = mask.segment_ids if mask.key_segment_ids is None else mask.key_segment_ids
        conditions.append(mask.segment_ids[:, :, None] == key_ids[:, None, :])
    if mask.key_lengths is not None:
        conditions.append(jnp.arange(keys) < mask.key_lengths[..., None])
    if not conditions:
        return None
    visible = functools.reduce(operator.and_, conditions)
    return jnp.broadcast_to(visible, (len(visible), queries, keys))[:, None]
