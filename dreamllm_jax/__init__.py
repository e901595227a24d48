"""DreamLLM in JAX: a language model that reads and writes documents of text and images."""

from typing import TYPE_CHECKING

from dreamllm_jax.document import Document
from dreamllm_jax.version import __version__

if TYPE_CHECKING:
    from dreamllm_jax.generate.api import DreamLLM

__all__ = ["Document", "DreamLLM", "__version__"]


def __getattr__(name: str):
    if name == "DreamLLM":  # imported when asked for, since it brings JAX and all models along
        from dreamllm_jax.generate.api import DreamLLM

        return DreamLLM
    raise AttributeError(f"module 'dreamllm_jax' has no attribute {name!r}")
