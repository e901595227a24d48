"""A tokenizer's own conversation template: the Jinja program that transformers keeps beside a tokenizer.

The program runs once, in a sandbox, on a conversation of marks; what it writes around the marks is a
`Template`. So what a user says never passes through it, and training and prompts share one form.
"""

from __future__ import annotations

import functools
import json
import os.path
import re
from typing import Any

from dreamllm_jax.data.templates import OWN, Template, get_template
from dreamllm_jax.data.tokenizer import Tokenizer

# What is said in the conversation that the program writes out: private characters, which no program knows.
_MARKS = tuple(f"\ue000{letter}\ue001" for letter in "abcd")
_BOS, _EOS = "<s>", "</s>"


def template_of(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name; `tokenizer` stands for the tokenizer's own.

    Raises:
      ValueError: an unknown name; a tokenizer without a template, or with one that cannot be used.
    """
    if name != OWN:
        return get_template(name)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"template {OWN!r} is the tokenizer's own, and this tokenizer has none; name another one, for "
            "example 'vicuna_v1.1'."
        )
    return derive(tokenizer.chat_template, frozenset(tokenizer.added_names) - {_BOS, _EOS})


@functools.lru_cache(maxsize=16)
def derive(program: str, control: frozenset[str] = frozenset()) -> Template:
    """The template that a Jinja program writes; `control` are tokens that it must not write.

    Raises:
      ValueError: the program fails, leaves out what was said, or writes one of these tokens.
    """
    talk, asked, trims = _run(program)
    first, after, rest, again, last = re.split("|".join(_MARKS), talk)
    first, cue = first.removeprefix(_BOS), asked.partition(_MARKS[0])[2]
    written = next((name for name in sorted(control) if name in first + after + rest), None)
    if written is not None:
        raise ValueError(
            f"The tokenizer's chat template writes {written}; of control tokens only <s> and </s> are "
            "supported. Name another template."
        )
    answered, closed, later = rest.partition(_EOS) if _EOS in rest else ("", "", rest)
    question = os.path.commonprefix([first[::-1], later[::-1]])[::-1]
    unfit = None
    if not closed or not last.startswith(answered + _EOS):
        unfit = "its answers do not end in </s>"
    elif again != after:
        unfit = "its later turns are not written as the first is"
    glued = not after.endswith(" ")
    after_user = after if glued else after[:-1]
    return Template(
        OWN,
        opening=first.removesuffix(question),
        before_user=question,
        after_user=after_user,
        after_answer=answered,
        between=later.removesuffix(question),
        glued=glued,
        trims=trims,
        cue=None if cue == after_user else cue,
        unfit=unfit,
    )


def _run(program: str) -> tuple[str, str, bool]:
    """(a conversation of four marks, a prompt of one, whether what is said loses its outer spaces)."""
    compiled = _compile(program)
    fault = "it leaves out what was said"
    for form in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        messages = [
            {"role": role, "content": form(f"\t{mark}\t")}
            for role, mark in zip(("user", "assistant") * 2, _MARKS, strict=True)
        ]
        try:
            talk = compiled.render(messages=messages, add_generation_prompt=False, **_TOKENS)
            asked = compiled.render(messages=messages[:1], add_generation_prompt=True, **_TOKENS)
        except Exception as error:  # whatever a program does wrong
            fault = str(error)
            continue
        if all(talk.count(mark) == 1 for mark in _MARKS) and asked.count(_MARKS[0]) == 1:
            trims = f"\t{_MARKS[0]}\t" not in talk
            for mark in _MARKS:
                talk, asked = (text.replace(f"\t{mark}\t", mark) for text in (talk, asked))
            return talk, asked, trims
    raise ValueError(f"The tokenizer's chat template cannot be used: {fault}; name another template.")


_TOKENS = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": "<unk>", "pad_token": "[PAD]"}


def _compile(program: str) -> Any:
    """The program in the environment that transformers gives it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, and writes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
    try:
        return environment.from_string(program)
    except TemplateError as error:
        raise ValueError(f"The tokenizer's chat template is not readable: {error}.") from error
