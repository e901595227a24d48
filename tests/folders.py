"""Folders of models, read whole or taken apart."""

import json
from pathlib import Path

from dreamllm_jax.checkpoint.model_folder import Pretrained
from dreamllm_jax.checkpoint.parameter_files import open_params, save_params
from dreamllm_jax.convert.opening import open_model


def load_pretrained(folder: str | Path) -> Pretrained:
    """`open_model` with every parameter read: path -> numpy array."""
    opened = open_model(folder)
    return opened._replace(params={path: tensor.read() for path, tensor in opened.params.items()})


def take_towers(folder: Path, target: Path, *towers: str) -> Path:
    """Writes a converted folder again with these towers only, without connectors; returns `target`."""
    params = {path: tensor.read() for path, tensor in open_params(folder).items()}
    save_params(target, {path: value for path, value in params.items() if path.split("/")[0] in towers})
    content = json.loads((folder / "config.json").read_text())
    for tower in ("llama", "vision", "unet", "vae"):
        if tower not in towers:
            content["model"][tower] = None
    (target / "config.json").write_text(json.dumps(content))
    return target
