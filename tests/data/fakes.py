"""A tokenizer small enough to write expectations by hand: one id per word."""

import re

from dreamllm_jax.data.tokenizer import SpecialTokens, Tokenizer

SPECIAL = SpecialTokens(
    bos=1,
    eos=2,
    unk=0,
    pad=90,
    im_start=91,
    dream_end=92,
    dream_start=93,
    im_patch=94,
    im_end=95,
    image=96,
    dream=97,
)


class WordTokenizer(Tokenizer):
    """Words get ids from 100 on, in the order in which they are first met."""

    def __init__(self):
        self.special = SPECIAL
        self.words: dict[str, int] = {}

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str, continues: bool = False):
        found = list(re.finditer(r"\S+", text))
        ids = [self.words.setdefault(match[0], 100 + len(self.words)) for match in found]
        return ids, [match.span() for match in found]
