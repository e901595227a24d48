"""PyTorch files without PyTorch: the same values, and nothing but values."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from dreamllm_jax.convert.pickles import LEGACY_MAGIC, read_pickle


def torch_zip(path, data_pkl: bytes, members: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    """Writes a file with the layout of torch.save."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in (members or {}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def tensor_ops(key: str, count: int, shape: tuple, storage="FloatStorage", function="_rebuild_tensor_v2"):
    """Returns pickle opcodes that build one contiguous tensor."""
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    numbers = [pickle.dumps(x, 2)[2:-1] for x in (count, 0, shape, strides)]
    return b"".join(
        [
            f"ctorch._utils\n{function}\n".encode() + b"(",
            b"(U\x07storage" + f"ctorch\n{storage}\n".encode(),
            b"U" + bytes([len(key)]) + key.encode() + b"U\x03cpu" + numbers[0] + b"tQ",
            *numbers[1:],
            b"\x89Ntq\x60R",
        ]
    ).replace(b"q\x60", b"")


def state_dict(**tensors: bytes) -> bytes:
    items = b"".join(b"U" + bytes([len(k)]) + k.encode() + v for k, v in tensors.items())
    return b"\x80\x02}(" + items + b"u."


class Global:
    """An object that is pickled as a call of any global with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_values_of_a_handmade_file(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    pkl = state_dict(w=tensor_ops("0", 12, (3, 4)))
    tensors, others = read_pickle(torch_zip(tmp_path / "a.bin", pkl, {"data/0": values.tobytes()}))
    assert list(tensors) == ["w"] and others == []
    np.testing.assert_array_equal(tensors["w"].read(), values)
    np.testing.assert_array_equal(tensors["w"].read(1, 2), values[1:2])


@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__])
def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, function):
    marker = tmp_path / "ran"
    payload = pickle.dumps({"w": Global(function, f"touch {marker}")}, 2)
    file = torch_zip(tmp_path / "evil.bin", payload)
    name = f"{function.__module__}.{function.__name__}".replace("builtins", "__builtin__")
    with pytest.raises(ValueError, match=rf"evil\.bin.*{name}"):
        read_pickle(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.__init__"),
        ("numpy", "load"),
        ("torch", "load"),
        ("omni.models", "Thing"),
        ("torch.storage", "_load_from_bytes"),
    ],
)
def test_names_near_the_allowed_ones_are_refused(tmp_path, module, name):
    file = torch_zip(tmp_path / "x.bin", b"\x80\x04" + f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match="refused"):
        read_pickle(file)


def test_state_cannot_be_pushed_into_the_allowed_functions(tmp_path):
    # BUILD with (None, {"value": 1}) sets attributes on an ordinary object.
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}U\x05valueK\x01stb."
    with pytest.raises(ValueError, match="no further state"):
        read_pickle(torch_zip(tmp_path / "x.bin", attack))


def test_a_tensor_outside_its_storage_is_an_error(tmp_path):
    pkl = state_dict(w=tensor_ops("0", 4, (3, 4)))
    file = torch_zip(tmp_path / "x.bin", pkl, {"data/0": bytes(16)})
    with pytest.raises(ValueError, match=r"x\.bin: w.*exceeds its storage"):
        read_pickle(file)


def test_a_flipped_bit_is_found_when_the_tensor_is_read(tmp_path):
    pkl = state_dict(w=tensor_ops("0", 4, (4,)))
    file = torch_zip(tmp_path / "x.bin", pkl, {"data/0": b"\x11" * 16})
    data = bytearray(file.read_bytes())
    data[data.index(b"\x11" * 16) + 5] ^= 4
    file.write_bytes(data)
    tensors, _ = read_pickle(file)
    with pytest.raises(ValueError, match=r"x\.bin is damaged"):
        tensors["w"].read()


@pytest.mark.parametrize("keep", [0, 1, 2, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_named(tmp_path, golden, keep):
    data = (golden / "dreamllm-a/checkpoint/pytorch_model.bin").read_bytes()
    short = tmp_path / "short.bin"
    short.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"short\.bin"):
        read_pickle(short)


def test_compressed_storages_and_foreign_archives_are_refused(tmp_path):
    pkl = state_dict(w=tensor_ops("0", 4, (4,)))
    squeezed = torch_zip(tmp_path / "x.bin", pkl, {"data/0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_pickle(squeezed)
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"y\.bin is a zip archive, but not one of torch\.save"):
        read_pickle(tmp_path / "y.bin")
    (tmp_path / "z.bin").write_text("<!doctype html>")
    with pytest.raises(ValueError, match=r"z\.bin is not a file of torch\.save"):
        read_pickle(tmp_path / "z.bin")


def legacy_file(path, values: np.ndarray):
    """Reads the format of torch.save before 1.6: consecutive pickles, then the storages."""
    out = io.BytesIO()
    for content in (LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(content, out, protocol=2)
    ops = tensor_ops("42", values.size, values.shape).replace(b"U\x03cpuK\x06tQ", b"U\x03cpuK\x06NtQ")
    out.write(state_dict(w=ops))
    pickle.dump(["42"], out, protocol=2)
    out.write(struct.pack("<q", values.size) + values.tobytes())
    path.write_bytes(out.getvalue())
    return path


def test_the_format_before_torch_1_6(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = legacy_file(tmp_path / "old.bin", values)
    np.testing.assert_array_equal(read_pickle(file)[0]["w"].read(), values)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"old\.bin"):
        read_pickle(file)


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 4)
    saved = OrderedDict(
        {
            "plain": base,
            "view": base[2:5, 1:3],
            "transposed": base.T,
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "expanded": torch.ones(1, 3).expand(4, 3),
            "bf16": torch.randn(5).bfloat16(),
            "half": torch.randn(5).half(),
            "long": torch.arange(3),
            "bool": torch.tensor([True, False]),
            "byte": torch.arange(3, dtype=torch.uint8),
        }
    )
    if zipped:
        saved["fp8"] = torch.randn(4).to(torch.float8_e4m3fn)
        saved["u16"] = torch.tensor([1, 2], dtype=torch.uint16)
    file = tmp_path / "x.bin"
    torch.save({**saved, "step": 3}, file, _use_new_zipfile_serialization=zipped)
    tensors, others = read_pickle(file)
    assert list(tensors) == list(saved) and others == ["step"]
    for name, value in saved.items():
        ours = tensors[name].read()
        assert ours.shape == tuple(value.shape)
        theirs = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(ours).reshape(-1).view(np.uint8), theirs, name)


@pytest.mark.parity
def test_wrappers_and_bare_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"epoch": 1, "state_dict": {"w": torch.ones(2)}}, tmp_path / "wrapped.pt")
    assert list(read_pickle(tmp_path / "wrapped.pt")[0]) == ["w"]
    torch.save(torch.nn.Parameter(torch.ones(2)), tmp_path / "bare.pt")
    assert list(read_pickle(tmp_path / "bare.pt")[0]) == [""]
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_pickle(tmp_path / "module.pt")
