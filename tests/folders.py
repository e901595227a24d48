"""Folders of models, read whole."""

from pathlib import Path

from dreamllm_jax.convert.pretrained import Pretrained, open_pretrained


def load_pretrained(folder: str | Path) -> Pretrained:
    """`open_pretrained` with every parameter read: path -> numpy array."""
    opened = open_pretrained(folder)
    return opened._replace(params={path: tensor.read() for path, tensor in opened.params.items()})
