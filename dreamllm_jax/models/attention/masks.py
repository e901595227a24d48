"""Who sees whom, said as a rule: kernels read the rule, the reference makes a table of it.

A table [B, 1, L, S] of booleans grows with the square of the length; a rule does not.
"""

from __future__ import annotations

import functools
import operator
import typing

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@typing.no_type_check  # shardings and axes travel in the same container
@flax.struct.dataclass
class Mask:
    """Conditions that hold together; one that is None (or False) is none.

    causal           query i sees the keys 0 to i; there are as many queries as keys
    segment_ids      a query sees keys of its own segment; in segment 0 (padding) it sees nothing
    key_segment_ids  the segments of the keys, where they are not those of the queries
    key_lengths      a query sees the first of the keys alone, this many (0: none): the entries of a cache
    """

    segment_ids: Int[Array, "B L"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    key_lengths: Int[Array, "#B #L"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def blinds(self) -> bool:
        """Whether there may be a query that sees nothing."""
        return self.segment_ids is not None or self.key_lengths is not None

    def row_by_row(self, queries: int) -> Mask:
        """The same rule with causality told by each query, so that queries can be taken apart."""
        if not self.causal and (self.segment_ids is None or self.key_segment_ids is not None):
            return self
        lengths = self.key_lengths
        if self.causal:
            rows = jnp.arange(1, queries + 1, dtype=jnp.int32)[None]
            lengths = rows if lengths is None else jnp.minimum(rows, lengths)
        keys = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
        return Mask(self.segment_ids, keys, lengths)


def packed(segment_ids: Int[Array, "B L"]) -> Mask:
    """Each position sees itself and what stands before it in its own segment; padding (0) sees nothing."""
    return Mask(segment_ids, causal=True)


def cached(positions: Int[Array, "B L"], valid: Bool[Array, "B L"]) -> Mask:
    """A valid token at position p sees the cache's entries 0 to p; an invalid one sees nothing."""
    return Mask(key_lengths=jnp.where(valid, positions + 1, 0))


def table(mask: Mask | None, queries: int, keys: int) -> Bool[Array, "#B 1 L S"] | None:
    """The rule as booleans, true where a query may look; None where nothing is hidden.

    Raises:
      ValueError: a causal rule for another number of keys than of queries.
    """
    if mask is None:
        return None
    conditions = []
    if mask.causal:
        if queries != keys:
            raise ValueError(
                f"A causal mask was given {queries} queries and {keys} keys; they must be as many. For a "
                "cache, give key_lengths."
            )
        rows = jnp.arange(queries)
        conditions.append(rows[None, :, None] >= rows)
    if mask.segment_ids is not None:
        theirs = mask.segment_ids if mask.key_segment_ids is None else mask.key_segment_ids
        ours = mask.segment_ids[:, :, None]
        conditions += [ours == theirs[:, None, :], ours > 0]
    if mask.key_lengths is not None:
        conditions.append(jnp.arange(keys) < mask.key_lengths[..., None])
    if not conditions:
        return None
    whole = functools.reduce(operator.and_, conditions)
    return jnp.broadcast_to(whole, (len(whole), queries, keys))[:, None]
