"""The plugins' files: PyTorch reads the same values; without PyTorch, an error comes before any writing."""

import sys

import ml_dtypes
import numpy as np
import pytest

from dreamllm_jax.checkpoint.tensors import ArrayTensor, Mapped
from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.pickles import read_pickle
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.convert.torch_files import write_torch_file
from tests.convert.test_convert import command
from tests.folders import take_towers

KINDS = (
    np.bool_,
    np.uint8,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.float16,
    ml_dtypes.bfloat16,
    np.float32,
    np.float64,
)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
def test_pytorch_reads_the_same_bits(kind, tmp_path):
    torch = pytest.importorskip("torch")
    values = np.array([[-1.5, 0, 3.25], [0.1, 7, 250]]).astype(kind)
    values.flags.writeable = False  # as JAX arrays are
    tensors = {
        "matrix": ArrayTensor("matrix", values),
        "transposed": Mapped(ArrayTensor("transposed", values), lambda array: array.T),
        "scalar": ArrayTensor("scalar", values[0, 2]),
        "empty": ArrayTensor("empty", values[:0]),
    }
    written = []
    write_torch_file(tmp_path / "x.bin", tensors, written.append)
    assert sum(written) == 13 * values.itemsize
    theirs = torch.load(tmp_path / "x.bin", weights_only=True)
    ours, others = read_pickle(tmp_path / "x.bin")
    assert list(theirs) == list(ours) == list(tensors) and not others
    for name, expected in (("matrix", values), ("transposed", values.T), ("scalar", values[0, 2])):
        assert str(theirs[name].dtype).removeprefix("torch.") == np.dtype(kind).name
        assert tuple(theirs[name].shape) == ours[name].shape == expected.shape
        bits = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(theirs[name].flatten().view(torch.uint8).numpy(), bits)
        np.testing.assert_array_equal(
            np.ascontiguousarray(ours[name].read()).reshape(-1).view(np.uint8), bits
        )
    assert tuple(theirs["empty"].shape) == ours["empty"].shape == (0, 3)


@pytest.mark.parity
def test_a_dtype_that_older_releases_cannot_load_is_refused(tmp_path):
    pytest.importorskip("torch")
    values = np.zeros(3, ml_dtypes.float8_e4m3fn)
    with pytest.raises(
        ValueError, match="w: dtype float8_e4m3fn cannot be written to a .bin file; use --dtype"
    ):
        write_torch_file(tmp_path / "x.bin", {"w": ArrayTensor("w", values)})
    assert not (tmp_path / "x.bin").exists()


def test_without_pytorch(golden, tmp_path, monkeypatch, capsys):
    """Exporting a complete DreamLLM is refused before anything is written; towers alone are exported."""
    convert_to_jax(open_checkpoint(golden / "dreamllm-a" / "checkpoint"), tmp_path / "jax")
    take_towers(tmp_path / "jax", tmp_path / "clip", "vision")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises an ImportError
    before = sorted(tmp_path.iterdir())
    assert command("to-torch", tmp_path / "jax", tmp_path / "out", "--quiet") == 2
    assert "run pip install 'dreamllm-jax[torch]'" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    convert_to_torch(tmp_path / "clip", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").params()[0]
