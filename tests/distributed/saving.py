"""Checks for agree.py: every process writes a part of a model, and the result is that of one process."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax import distributed
from dreamllm_jax.checkpoint import model_folder, parallel_writing, tensors
from dreamllm_jax.checkpoint.model_folder import open_pretrained, save_pretrained, write_pretrained
from dreamllm_jax.checkpoint.parameter_files import to_device
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.sharding import make_mesh, parameter_shardings
from tests.train import tiny


def check_saving(folder: Path, config: DreamLLMConfig, tokenizer: Tokenizer) -> None:
    """Saves parameters of every kind (files, numpy, replicated, divided) and compares the folders."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2))
    values = tiny.random_params(config)
    if distributed.is_main():
        write_pretrained(folder / "alone", values, config, tokenizer, GenerationConfig())
    distributed.barrier("one process has written")
    alone = open_pretrained(folder / "alone").params
    mixed = dict(values)
    names = sorted(values)
    for name, sharding in parameter_shardings(values, mesh).items():
        mixed[name] = to_device(values[name], sharding)
    mixed[names[0]] = to_device(values[names[0]], NamedSharding(mesh, PartitionSpec()))
    mixed |= {name: alone[name] for name in names[1::4]} | {name: values[name] for name in names[2::4]}
    divided = [name for name in mixed if distributed.spans_processes(mixed[name])]
    assert len(divided) >= 3, divided

    wrote, gathered = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHUNK_BYTES", 4096)  # several chunks for most parameters
        write, gather = parallel_writing.write_safetensors, parallel_writing.gather_rows

        def recorded_write(file, *rest):
            wrote.append(file.name)
            return write(file, *rest)

        def recorded_gather(array, *rows):
            gathered.append(array)
            return gather(array, *rows)

        patch.setattr(parallel_writing, "write_safetensors", recorded_write)
        patch.setattr(parallel_writing, "gather_rows", recorded_gather)
        save_pretrained(folder / "together", mixed, config, tokenizer, GenerationConfig())
    # Both wrote, each other files, and about half of the bytes; only divided arrays went over the devices.
    everyones = distributed.all_gather(wrote)
    files = sorted(path.name for path in (folder / "together").glob("params*.safetensors"))
    assert all(everyones) and sorted(everyones[0] + everyones[1]) == files
    sizes = [sum((folder / "together" / name).stat().st_size for name in part) for part in everyones]
    assert max(sizes) < 0.7 * sum(sizes), sizes
    assert {id(array) for array in gathered} == {id(mixed[name]) for name in divided}
    assert len(gathered) > len(divided)  # more than one chunk

    together = open_pretrained(folder / "together")
    assert together.config == config and list(together.params) == list(alone)
    for name, tensor in together.params.items():
        np.testing.assert_array_equal(tensor.read(), values[name], err_msg=name)
        ours, theirs = tensor.storage.checksums, alone[name].storage.checksums
        assert ours is not None and ours == theirs, name
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []

    # Whatever is wrong with the folder is an error of all processes.
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "notes" / f"{jax.process_index()}.txt").write_text("mine")
    distributed.barrier("notes are written")
    with pytest.raises(ValueError, match="holds something other than a saved model"):
        save_pretrained(folder / "notes", mixed, config, tokenizer, GenerationConfig())
    with pytest.raises(ValueError, match="GiB of disk space"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "num_bytes", lambda tensor: 10**18)
        save_pretrained(folder / "together", mixed, config, tokenizer, GenerationConfig())
