"""LLaMA and Vicuna, as transformers saves them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.convert.foreign import ForeignCheckpoint, PrefixRule, open_folder, stated_ids
from dreamllm_jax.data.chat import OWN, template_of
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokenizer_files import has_tokenizer, read_chat_template

PREFIXES = (PrefixRule("", "llama"),)


def open_llama(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    """Opens a language model; prompts use its own chat template, if it has one that can be used."""
    source = open_folder("LLaMA", folder, DreamLLMConfig(llama=LlamaConfig.from_hf(raw)), PREFIXES)
    template = None
    if has_tokenizer(folder) and read_chat_template(folder) is not None:
        try:
            template_of(OWN, Tokenizer.load(folder, extend=True))
            template = OWN
        except ValueError as error:
            source.report.differing.append(f"prompts are not put into the tokenizer's chat template: {error}")
    return dataclasses.replace(source, stated=stated_ids(raw), template=template)
