"""How a conversation is written out: names, system text and separators of each template.

A dialog becomes `{opening}{before_user}question{after_user} answer{after_answer}</s>{before_user}...`; the
answer is a chunk of its own, so the space before it is the tokenizer's. Where a template `restarts`, every
later question begins with `<s>`, as the first one does.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Template:
    """Text around the turns of a conversation."""

    name: str
    opening: str = ""
    before_user: str = ""
    after_user: str = ""
    after_answer: str = ""
    restarts: bool = False


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
        Template("llama2", "", "[INST] ", " [/INST]", after_answer=" ", restarts=True),
    )
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
      ValueError: an unknown name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"Unknown conversation template {name!r}; known: {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]
