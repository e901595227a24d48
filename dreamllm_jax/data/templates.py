"""How a conversation is written out: names, system text and separators of each template.

A dialog becomes `{opening}{before_user}question{after_user} answer{after_answer}</s>`, and every later
question begins with `{between}{before_user}`. The answer is a chunk of its own, so the space before it is
the tokenizer's. `<s>` and `</s>` in a template's text are the control tokens; in a question they are
characters, as everywhere.
"""

from __future__ import annotations

import dataclasses

# The name under which a tokenizer's own template goes (see `chat_templates`).
OWN = "tokenizer"


@dataclasses.dataclass(frozen=True)
class Template:
    """Text around the turns of a conversation.

    A `glued` answer follows the question's text without a space. One that `trims` strips what a user says.
    `cue` is what a prompt ends in where that is not `after_user`. One that is `unfit` cannot write whole
    conversations; the text says why.
    """

    name: str
    opening: str = ""
    before_user: str = ""
    after_user: str = ""
    after_answer: str = ""
    between: str = ""
    glued: bool = False
    trims: bool = False
    cue: str | None = None
    unfit: str | None = None


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain"),
        Template(
            "vicuna_v1.1",
            opening=(
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                "helpful, detailed, and polite answers to the user's questions. "
            ),
            before_user="USER: ",
            after_user=" ASSISTANT:",
        ),
        # LLaMA-2-chat (arXiv 2307.09288), without a system prompt.
        Template("llama2", "", "[INST] ", " [/INST]", after_answer=" ", between="<s>"),
    )
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
      ValueError: an unknown name.
    """
    if name not in TEMPLATES:
        known = ", ".join(sorted([*TEMPLATES, OWN]))
        raise ValueError(f"Unknown conversation template {name!r}; known: {known}.")
    return TEMPLATES[name]
