"""Opens a model in any form: a folder of ours, a checkpoint in PyTorch's formats, or a model on the hub.

Commands and `DreamLLM.from_pretrained` call `open_model`. It is the one place that chooses between
`checkpoint` and conversion.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from dreamllm_jax.checkpoint.model_folder import Pretrained, is_model_folder, open_pretrained
from dreamllm_jax.checkpoint.parameter_files import cast
from dreamllm_jax.checkpoint.vocabulary import with_control_tokens
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.convert.recognize import open_checkpoint


def open_model(path: str | Path, dtype: str | None = None) -> Pretrained:
    """Opens a model without reading its parameters; `dtype` casts the floating ones.

    `path` is a folder that `save_pretrained` wrote, a checkpoint in one of PyTorch's formats (see
    `recognize`), or the id of a model on the Hugging Face hub.

    Raises:
      ValueError: the folder is missing, of an unknown kind, incomplete or damaged.
    """
    folder = download(path)
    if not (folder / "config.json").is_file() and not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder of weights.")
    if is_model_folder(folder):
        return open_pretrained(folder, dtype)
    source = open_checkpoint(folder)
    params, report = source.params()
    report.raise_if_faulty(str(folder))
    for line in report.differing:
        warnings.warn(f"{folder}: {line}", stacklevel=2)
    if source.model.llama is None:
        raise ValueError(f"{folder} ({source.kind}) has no language model; give a folder that has one.")
    config, params, tokenizer = with_control_tokens(source.model, params, folder)
    return Pretrained(config, cast(params, dtype), tokenizer, GenerationConfig(template=source.template))


def download(path: str | Path) -> Path:
    """Returns the folder itself, or the folder of a hub model's files, downloading those that are missing.

    Raises:
      ValueError: `path` is neither a folder nor a model that can be downloaded.
    """
    folder = Path(path)
    if folder.exists() or not isinstance(path, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}; give a folder of weights, or the id of a model on the hub.")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path))
    except Exception as error:  # of requests, urllib3 or the hub's own client
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} does not exist as a folder, and could not be downloaded from the hub ({reason}); give "
            "an existing folder, or check the id and the network connection."
        ) from error
