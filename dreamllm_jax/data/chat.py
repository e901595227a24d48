"""Conversations as pieces, through a chat template in Jinja: the tokenizer's own, or one of `templates/`.

transformers renders the template; a control token's name in a message stays text (see `chat_rendering`).
Images keep their places in the message. The model learns the answers, each with the token that
closes it.

In:    turns of text and images.
Out:   the pieces of a document.
Never: encodes text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dreamllm_jax.data.chat_rendering import Guard, render
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import ControlToken, End, Picture, Piece, part_to_piece
from dreamllm_jax.data.tokenizer import Tokenizer

# The name by which recipes select the tokenizer's own template.
OWN = "tokenizer"
_FOLDER = Path(__file__).parent / "templates"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = re.compile(r"(<image>|<dream>)")
Turn = str | Sequence[str | ImageLike | Piece]
_Said = list[str | Piece]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and what it needs to know of a tokenizer.

    Attributes:
      name: what recipes call it.
      source: the Jinja template.
      control: {name of a control token: (strips the text before it, the text after it)}.
      variables: what it reads beside the messages: {"bos_token": "<s>", "eos_token": "</s>"}.
      origin: what error messages call it.
    """

    name: str
    source: str
    control: Mapping[str, tuple[bool, bool]]
    variables: Mapping[str, str]
    origin: str

    def conversation(self, turns: Sequence[_Said]) -> list[Piece]:
        """Returns the pieces of alternating turns of user and assistant.

        Raises:
          ValueError: the template fails, loses an image, or does not show what the assistant writes.
        """
        guard, messages = self._guarded(turns)
        if _GENERATION.search(self.source):
            rendered, learned = self._render(messages, guard)
            if not learned:
                raise self._unusable("it marks no answer by {% generation %}")
        else:
            rendered, learned = self._answers(messages, guard)
        return self._pieces(guard, rendered, learned)

    def question(self, said: _Said) -> list[Piece]:
        """Returns the pieces of a conversation up to where the assistant answers the first question.

        Raises:
          ValueError: the template fails, or loses an image.
        """
        guard, messages = self._guarded([said])
        return self._pieces(guard, self._render(messages, guard, prompt=True)[0], [])

    @functools.cached_property
    def closing(self) -> str | None:
        """The control token that closes an answer; None if it is the tokenizer's end token.

        It is also None if the template does not show how answers end.
        """
        try:
            pieces = self.conversation([["Is it so?"], ["It is."]])
        except ValueError:
            return None
        last = [piece for piece in pieces if isinstance(piece, ControlToken | End) and piece.supervised][-1:]
        return last[0].name if last and isinstance(last[0], ControlToken) else None

    def _answers(self, messages: list[dict], guard: Guard) -> tuple[str, list[tuple[int, int]]]:
        """Returns (text, spans of the answers), found by rendering prefixes of the conversation.

        An answer begins where the prompt for it ends, and ends with the control token that closes it:

            [user]             -> <s>[INST] Hi [/INST]
            [user, assistant]  -> <s>[INST] Hi [/INST] Hello </s>
                                                      ^^^^^^^^^^^
        """
        rendered, _ = self._render(messages, guard)
        spans = []
        for i in range(1, len(messages), 2):
            prompt, _ = self._render(messages[:i], guard, prompt=True)
            answered, _ = self._render(messages[: i + 1], guard)
            if not (rendered.startswith(prompt) and answered.startswith(prompt)):
                raise self._unusable(
                    "the prompt for an answer is not the beginning of the answered conversation; mark the "
                    "answers in it by {% generation %}"
                )
            closing = [match["control"] for match in guard.controls(answered, len(prompt))]
            ends = [m.end() for m in guard.controls(rendered, len(prompt)) if m["control"] in closing[-1:]]
            if not ends:
                raise self._unusable("its answers do not end in a control token")
            spans.append((len(prompt), ends[0]))
        return rendered, spans

    def _guarded(self, turns: Sequence[_Said]) -> tuple[Guard, list[dict]]:
        """Returns the guard of the turns, and the turns as escaped chat messages."""
        said = "".join(part for turn in turns for part in turn if isinstance(part, str))
        guard, messages = Guard(self.control, self.source + said), []
        for i, turn in enumerate(turns):
            parts = (guard.text(p) if isinstance(p, str) else guard.picture(p) for p in turn)
            content = "".join(parts)
            messages.append(
                {
                    "role": "assistant" if i % 2 else "user",
                    "content": [{"type": "text", "text": content}] if self.takes_parts else content,
                }
            )
        return guard, messages

    def _pieces(self, guard: Guard, rendered: str, learned: list[tuple[int, int]]) -> list[Piece]:
        if guard.lost(rendered):
            raise self._unusable("it loses or repeats an image")
        bos = self.variables["bos_token"] if "bos_token" in self.variables else None
        return guard.pieces(rendered, learned, bos, self.variables["eos_token"])

    def _render(
        self, messages: list[dict], guard: Guard | None = None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        variables = {**self.variables, "chunk": guard.chunk} if guard is not None else self.variables
        marks = _GENERATION.search(self.source) is not None
        try:
            return render(self.source, messages, variables, prompt, marks)
        except Exception as error:  # whatever a template does wrong
            raise self._unusable(str(error)) from error

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether a message is a list of parts, [{"type": "text", "text": ...}], as for multimodal models.

        Raises:
          ValueError: the template fails, or leaves out what is said.
        """
        fault = None
        for parts in (False, True):
            content = [{"type": "text", "text": "Is it so?"}] if parts else "Is it so?"
            try:
                rendered, _ = self._render([{"role": "user", "content": content}], prompt=True)
                if "Is it so?" in rendered:
                    return parts
            except ValueError as error:
                fault = fault or error
        raise fault or self._unusable("it leaves out what is said")

    def _unusable(self, fault: str) -> ValueError:
        return ValueError(f"{self.origin} cannot be used: {fault}; name another template.")


@functools.cache
def get_template(name: str) -> ChatTemplate:
    """Returns the built-in template of that name.

    Raises:
      ValueError: an unknown name.
    """
    known = sorted(path.stem for path in _FOLDER.glob("*.jinja"))
    if name not in known:
        raise ValueError(
            f"Unknown conversation template {name!r}; known: {', '.join(sorted([*known, OWN]))}."
        )
    return ChatTemplate(
        name,
        (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
        control={"<s>": (False, False), "</s>": (False, False)},
        variables={"bos_token": "<s>", "eos_token": "</s>"},
        origin=f"The chat template {name!r}",
    )


def template_of(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the template of that name; `tokenizer` stands for the tokenizer's own.

    Raises:
      ValueError: an unknown name; a tokenizer without a template, or with one that cannot be used.
    """
    if name != OWN:
        return get_template(name)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"template {OWN!r} is the tokenizer's own, and {tokenizer.origin} has none; name another one, "
            "for example 'vicuna_v1.1'."
        )
    template = ChatTemplate(
        OWN,
        tokenizer.chat_template,
        control={name: (token.lstrip, token.rstrip) for name, token in tokenizer.control.items()},
        variables={**tokenizer.names, "pad_token": "[PAD]"},
        origin=f"The chat template of {tokenizer.origin}",
    )
    template.takes_parts  # noqa: B018  (it raises where the template cannot be used)
    return template


def conversation(
    turns: Sequence[Turn], images: Iterable[ImageLike] = (), template: str | ChatTemplate = "vicuna_v1.1"
) -> list[Piece]:
    """Returns alternating user and assistant turns as pieces; answers and their closing tokens are learned.

    A turn is a string, where `<image>` stands for an image to see and `<dream>` for one to dream
    and then see, taken from `images` in order; or a sequence of strings (plain text, no markers)
    and images. Encode the result with any `eos`: it ends as the template says.

    Raises:
      ValueError: an odd number of turns, an unknown template or one that cannot be learned from,
        markers and images that differ in number.
    """
    if not turns or len(turns) % 2:
        raise ValueError(
            f"A conversation has {len(turns)} turns; give an even number, alternating user and assistant."
        )
    template = template if isinstance(template, ChatTemplate) else get_template(template)
    queue = iter(images)
    said: list[_Said] = []
    for i, turn in enumerate(turns):
        parts = list(_expand(turn, queue, supervised=i % 2 == 1))
        if i % 2 and isinstance(turn, str) and isinstance(parts[0], str):
            parts[0] = parts[0].lstrip()
        said.append(parts)
    left = sum(1 for _ in queue)
    if left:
        raise ValueError(f"The conversation has {left} more images than <image> and <dream> markers.")
    return template.conversation(said)


def question(parts: Iterable[str | ImageLike | Piece], template: ChatTemplate) -> list[Piece]:
    """Returns the beginning of a conversation up to where the assistant answers, strings as plain text."""
    return template.question([part if isinstance(part, str) else part_to_piece(part) for part in parts])


def _expand(turn: Turn, queue: Iterator[ImageLike], supervised: bool) -> Iterator[str | Piece]:
    if not isinstance(turn, str):
        yield from (part if isinstance(part, str) else part_to_piece(part) for part in turn)
        return
    for part in _MARKER.split(turn):
        if part not in ("<image>", "<dream>"):
            yield part
            continue
        image = next(queue, None)
        if image is None:
            raise ValueError("The conversation has more <image> and <dream> markers than images.")
        yield Picture(image, seen=True, dreamed=part == "<dream>", supervised=supervised)
