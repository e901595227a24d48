"""A picture written in words: the layout of a picture, with a word in its slots and no image."""

from __future__ import annotations

import dataclasses
import itertools

from dreamllm_jax.data.pieces import TokenPicture
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class WordPicture(TokenPicture):
    """A picture whose slots hold a word; the model learns the word in the query slots.

    `position` says where among the query slots the word is: 0 at the beginning, 1 at the end, None nowhere.
    `patches` are the words of the patch slots, repeated as often as needed; the patches of one picture may
    disagree. Slots without a word hold `<im_patch>`. A language model thus learns from text alone what its
    queries will have to express, and what its patches will tell it.

    Example: with 3 query slots, `WordPicture("seven", seen=False, dreamed=True, position=1.0)` is written
    `<dream_start> <im_patch> <im_patch> seven <dream_end>`.
    """

    word: str
    seen: bool
    dreamed: bool
    position: float | None = 1.0
    patches: tuple[str, ...] = ()
    supervised: bool = True

    def query_tokens(self, tokenizer: Tokenizer, num_queries: int) -> tuple[list[int], list[bool]]:
        """Returns the word among the query slots; only the word is learned."""
        word = [] if self.position is None else _encode(self.word, tokenizer, num_queries)
        free = num_queries - len(word)
        before = round(free * (self.position or 0.0))
        patch = tokenizer.special.im_patch
        tokens = [patch] * before + word + [patch] * (free - before)
        return tokens, [before <= i < before + len(word) and self.supervised for i in range(num_queries)]

    def patch_tokens(self, tokenizer: Tokenizer, num_patches: int) -> list[int]:
        """Returns the words of the patches, in turn."""
        words = [token for word in self.patches for token in _encode(word, tokenizer, num_patches)]
        return list(itertools.islice(itertools.cycle(words or [tokenizer.special.im_patch]), num_patches))


def _encode(word: str, tokenizer: Tokenizer, slots: int) -> list[int]:
    tokens = tokenizer.encode(word)
    if not 1 <= len(tokens) <= slots:
        raise ValueError(
            f"A picture written as {word!r} takes {len(tokens)} tokens; its slots have room for 1 to "
            f"{slots}. Use a shorter word."
        )
    return tokens
