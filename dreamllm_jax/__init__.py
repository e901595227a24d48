"""DreamLLM in JAX: a language model that reads and writes documents of text and images."""

from dreamllm_jax.document import Document

__version__ = "0.1.0"
__all__ = ["Document", "DreamLLM"]


def __getattr__(name: str):
    if name == "DreamLLM":  # imported when asked for, since it brings JAX and all models along
        from dreamllm_jax.generate.api import DreamLLM

        return DreamLLM
    raise AttributeError(f"module 'dreamllm_jax' has no attribute {name!r}")
