"""Folders of parameters: complete or absent, bit for bit, with checksums."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dreamllm_jax.checkpoint.parameter_files import (
    INDEX_FILE,
    cast,
    open_params,
    read_blocks,
    save_params,
    to_device,
)
from dreamllm_jax.checkpoint.safetensors_files import read_safetensors


def params():
    rng = np.random.default_rng(0)
    return {
        "llama": {
            "layers": {"kernel": rng.normal(size=(3, 4, 5)).astype(np.float32)},
            "norm": {"scale": jnp.ones((4,), jnp.bfloat16)},
        },
        "vae": {"n": np.arange(3, dtype=np.int32), "scalar": np.float32(2.5).reshape(())},
    }


def load(folder, dtype=None):
    """Returns all parameters of a folder, read and nested."""
    return unflatten_dict(
        {path: tensor.read() for path, tensor in cast(open_params(folder), dtype).items()}, sep="/"
    )


def assert_same(a, b):
    assert a.shape == b.shape and np.dtype(a.dtype) == np.dtype(b.dtype)
    np.testing.assert_array_equal(
        np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_saved_parameters_come_back(tmp_path, shard_bytes):
    save_params(tmp_path, params(), shard_bytes=shard_bytes)
    loaded, saved = flatten_dict(load(tmp_path), sep="/"), flatten_dict(params(), sep="/")
    assert set(loaded) == set(saved)
    for path in saved:
        assert_same(loaded[path], np.asarray(saved[path]))
    assert unflatten_dict(loaded, sep="/").keys() == params().keys()


def test_other_readers_understand_the_files(tmp_path):
    save_params(tmp_path, params())
    theirs = load_file(tmp_path / "params.safetensors")
    assert_same(theirs["llama/layers/kernel"], params()["llama"]["layers"]["kernel"])
    save_file({"x": np.ones((2, 3), ml_dtypes.bfloat16)}, tmp_path / "theirs.safetensors")
    assert_same(
        read_safetensors(tmp_path / "theirs.safetensors")["x"].read(), np.ones((2, 3), ml_dtypes.bfloat16)
    )


def test_dtype_and_blocks(tmp_path):
    save_params(tmp_path, params(), dtype="bfloat16")
    tensors = open_params(tmp_path)
    assert tensors["llama/layers/kernel"].dtype == ml_dtypes.bfloat16
    assert tensors["vae/n"].dtype == np.int32
    whole = tensors["llama/layers/kernel"].read()
    cuts = [(slice(1, 3), slice(None), slice(0, 2)), (slice(None), slice(2, 4), slice(None))]
    for cut, block in zip(cuts, read_blocks(tensors["llama/layers/kernel"], cuts), strict=True):
        np.testing.assert_array_equal(block, whole[cut])
    placed = load(tmp_path, dtype="float32")
    assert placed["llama"]["layers"]["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match="int4"):
        load(tmp_path, dtype="int4")


def test_damage_is_named(tmp_path):
    save_params(tmp_path, params(), shard_bytes=1)
    shard = tmp_path / json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]["llama/layers/kernel"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        load(tmp_path)
    shard.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        load(tmp_path)
    shard.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=rf"{shard.name}"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"incomplete: {shard.name} missing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is not a converted model"):
        load(tmp_path / "nothing")


def test_an_index_cannot_point_elsewhere(tmp_path):
    save_params(tmp_path, params())
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        load(tmp_path)


def test_a_failing_tensor_leaves_no_readable_folder(tmp_path):
    class Broken:
        origin, shape, dtype, row_readable = "broken", (2,), np.dtype(np.float32), True

        def read(self, start=None, stop=None):
            raise ValueError("no")

    save_params(tmp_path, params())
    with pytest.raises(ValueError, match="no"):
        save_params(tmp_path, {"a": np.ones(2), "b": Broken()})
    assert [p.name for p in tmp_path.iterdir()] == []


@pytest.mark.parametrize("row_readable", [True, False])
def test_blocks_share_what_is_read(row_readable, monkeypatch, devices):
    """Every row is read once, in chunks if the tensor is row-readable; every device gets its own block."""
    values = np.arange(8 * 6 * 4, dtype=np.float32).reshape(8, 6, 4)
    reads = []

    class Watched:
        origin, shape, dtype = "watched", values.shape, values.dtype

        def __init__(self):
            self.row_readable = row_readable

        def read(self, start=None, stop=None):
            reads.append((start, stop))
            return values[start:stop]

    monkeypatch.setattr("dreamllm_jax.checkpoint.tensors.CHUNK_BYTES", values[0].nbytes)  # two in bfloat16
    mesh = jax.make_mesh((2, 4), ("a", "b"), devices=devices)
    for spec in (P("a"), P(None, "a"), P("b", None, "a"), P()):
        placed = to_device(Watched(), NamedSharding(mesh, spec), jnp.bfloat16)
        np.testing.assert_array_equal(placed, values.astype(jnp.bfloat16))
        assert placed.sharding.spec == spec and placed.dtype == jnp.bfloat16
        assert reads == ([(0, 2), (2, 4), (4, 6), (6, 8)] if row_readable else [(0, 8)])
        reads.clear()
