"""Renders chat templates with transformers, and splits the result into pieces.

Messages are escaped before they are rendered. Private-use characters that do not occur in the conversation
enclose every typed name of a control token, and stand for images. In the template's output, a name without
such marks is therefore a real control token:

    said      Stop at </s>
    guarded   Stop at ⟨</s>⟩
    rendered  <s>[INST] Stop at ⟨</s>⟩ [/INST]
    pieces    Begin, Text("[INST] Stop at </s> [/INST]")

The marks survive what published templates do with a message: `strip`, `split`, `in`, joining. Two limits:
if a template deletes letters of a message, the rest could form a control token's name; and if it splits a
message at such a name (thoughts before `</think>`), it does not strip the spaces next to the name.
"""

from __future__ import annotations

import datetime
import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dreamllm_jax.config.hugging_face import import_transformers
from dreamllm_jax.data.pieces import Begin, ControlToken, End, Piece, Text

Spans = Sequence[tuple[int, int]]
_PRIVATE = range(0xF0000, 0xFFFFE)
# The date given to templates that ask for it: tokens must not depend on the day. Llama 3's templates fall
# back to the same date. transformers does not accept a function, so a macro of that name replaces its own.
_TODAY = datetime.datetime(2024, 7, 26)
_DATES = "".join(f".replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in "aAbBdjmyYHIMSp")
_DATE_MACRO = "{% macro strftime_now(format) %}{{ format" + _DATES + " }}{% endmacro %}"
_LOCK = threading.Lock()  # transformers keeps one compiled template, with state, for all threads


def render(
    template: str, messages: list[dict], variables: Mapping[str, Any], prompt: bool, marks_answers: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the rendered text, and the spans [start, end) of its `{% generation %}` blocks.

    With `prompt`, the template adds the text that precedes an answer. Its errors are not caught. It always
    sees the date 26 July 2024, so that a resumed run reads the same tokens.
    """
    import_transformers()
    from transformers.utils.chat_template_utils import render_jinja_template

    if "strftime_now" in template:
        template = _DATE_MACRO + template
    with _LOCK:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks_answers,
            **variables,
        )
    texts, spans = rendered
    return texts[0], spans[0] if marks_answers else []


class Guard:
    """Escapes typed control tokens and images in one conversation.

    `chunk` is a character that our own templates may write: the text after it is encoded as a chunk of its
    own, so that the tokenizer puts the space before it.
    """

    def __init__(self, control: Mapping[str, tuple[bool, bool]], said: str):
        """`control`: {name of a control token: (strips the text before it, the text after it)}.

        `said` is all text of the conversation, and the template's.
        """
        self._control = control
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in said)
        self._open, self._close, self._seam, self.chunk = (next(self._free) for _ in range(4))
        self._pictures: dict[str, Piece] = {}
        names = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        self._names, self._ends = re.compile(names), _ends(tuple(control))
        self._special = re.compile(
            f"{self._open}(?P<typed>{names}){self._close}|(?P<control>{names})"
            f"|[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]"
        )

    def text(self, said: str) -> str:
        """Returns the text with typed names of control tokens escaped."""
        said = self._names.sub(f"{self._open}\\g<0>{self._close}", said)
        bare = said.strip()
        before = said[: len(said) - len(said.lstrip())]
        after = said[len(before) + len(bare) :]
        first, last, names = self._ends
        cuts = range(1, min(len(bare) + 1, max(map(len, self._control))))
        begins = any(bare[:k] in last for k in cuts) or (bare != "" and bare in names)
        ends = any(bare[-k:] in first for k in cuts)
        return before + self._seam * begins + bare + self._seam * ends + after

    def picture(self, picture: Piece) -> str:
        """Returns the character that stands for an image, or for another piece that is not plain text."""
        mark = next(self._free)
        self._pictures[mark] = picture
        return mark

    def controls(self, rendered: str, start: int = 0) -> Iterator[re.Match[str]]:
        """Returns the control tokens that the template wrote."""
        return (match for match in self._special.finditer(rendered, start) if match["control"])

    def lost(self, rendered: str) -> bool:
        """Returns whether the rendered text lacks an image or repeats one."""
        return any(rendered.count(mark) != 1 for mark in self._pictures)

    def pieces(self, rendered: str, learned: Spans, bos: str | None, eos: str) -> list[Piece]:
        """Returns the pieces of the rendered text; the characters in the spans `learned` are supervised.

        A document that does not begin with `bos` begins with `Begin(token=False)`; one that does not end with
        `eos` ends with `End(token=False)`.
        """
        out, at = _Pieces(learned), 0
        for match in self._special.finditer(rendered):
            out.text(rendered[at : match.start()], at)
            at = match.end()
            if match["typed"]:
                out.text(match["typed"], match.start("typed"))
            elif name := match["control"]:
                supervised, first = out.is_learned(match.start()), not (out.pieces or out.runs)
                if name == bos and (first or name != eos):
                    token: Piece = Begin(supervised)
                else:
                    token = End(supervised) if name == eos else ControlToken(name, supervised)
                out.token(token, *self._control[name])
            elif match[0] == self.chunk:
                out.end_chunk(continues=False)
            elif match[0] in self._pictures:
                out.token(self._pictures[match[0]])
            elif match[0] not in (self._open, self._close, self._seam):
                out.text(match[0], match.start())
        out.text(rendered[at:], at)
        out.end_chunk()
        begun = bool(out.pieces) and isinstance(out.pieces[0], Begin)
        ended = bool(out.pieces) and isinstance(out.pieces[-1], End)
        return [
            *([] if begun else [Begin(token=False)]),
            *out.pieces[begun:],
            *([] if ended else [End(supervised=False, token=False)]),
        ]


@functools.lru_cache(maxsize=16)
def _ends(names: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], str]:
    """Returns all proper prefixes of the names, all proper suffixes, and the names joined by line breaks."""
    cuts = [(name[:k], name[k:]) for name in names for k in range(1, len(name))]
    firsts, lasts = (frozenset(side) for side in zip(*cuts, strict=True))
    return firsts, lasts, "\n".join(names)


class _Pieces:
    """Pieces as they are read: tokens and images, and between them chunks of text in learned runs."""

    def __init__(self, learned: Spans):
        self.learned, self.pieces = learned, []
        self.runs: list[tuple[str, bool]] = []
        self.continues = self.strips = False

    def is_learned(self, at: int) -> bool:
        return any(start <= at < end for start, end in self.learned)

    def text(self, text: str, at: int) -> None:
        """Appends `text` to the current chunk; `at` is its offset in the rendered string."""
        cuts = {0, len(text), *(edge - at for span in self.learned for edge in span)}
        cuts = sorted(cut for cut in cuts if 0 <= cut <= len(text))
        for start, end in zip(cuts, cuts[1:], strict=False):
            run = text[start:end].lstrip() if self.strips else text[start:end]
            if run:
                self.strips = False
                self.runs.append((run, self.is_learned(at + start)))

    def token(self, token: Piece, left: bool = False, right: bool = False) -> None:
        """Appends a token or an image; `left` and `right` strip the spaces before and after it."""
        while left and self.runs:
            text, learned = self.runs.pop()
            if text.rstrip():
                self.runs.append((text.rstrip(), learned))
                break
        self.end_chunk()
        self.pieces.append(token)
        self.strips = right

    def end_chunk(self, continues: bool = True) -> None:
        """Ends a chunk; `continues` says how the next one begins."""
        begun = False
        for text, learned in self.runs:
            last = self.pieces[-1] if begun else None
            if isinstance(last, Text) and last.supervised == learned:
                self.pieces[-1] = Text(last.text + text, learned, continues=last.continues, glued=last.glued)
            else:
                self.pieces.append(Text(text, learned, continues=self.continues, glued=begun))
            begun = True
        self.runs, self.continues, self.strips = [], continues, False
