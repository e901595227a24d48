"""Writes `.bin` files that `torch.load` reads, without PyTorch, streaming.

The reference loads its plugins from such files only. The layout is that of `torch.save` (a stored
zip of one pickle and one member per tensor, aligned to 64 bytes); the pickle is assembled from the
few opcodes that a state dict needs.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

from dreamllm_jax.convert.tensors import DTYPE_NAMES, Tensor, num_bytes, stream

_STORAGES = {
    "BOOL": "BoolStorage",
    "U8": "ByteStorage",
    "I8": "CharStorage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "I64": "LongStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
}
_ALIGNMENT = 64
_ZIP64_EXTRA = 20


def write_pickle(
    file: str | Path, tensors: Mapping[str, Tensor], progress: Callable[[int], None] = lambda count: None
) -> None:
    """Streams a state dict into `file`, which appears only when it is complete."""
    file = Path(file)
    root = file.stem
    beside = file.with_name(f".{file.name}.partial")
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            _member(archive, f"{root}/data.pkl", _state_dict(tensors))
            _member(archive, f"{root}/byteorder", b"little")
            pieces = groupby(stream(tensors.values()), key=lambda entry: entry[0])
            for (key, group), tensor in zip(pieces, tensors.values(), strict=True):
                info = _aligned(archive, f"{root}/data/{key}")
                with archive.open(info, "w", force_zip64=True) as out:
                    for _, piece in group:
                        out.write(memoryview(piece.reshape(-1).view("u1")) if piece.size else b"")
                        progress(piece.nbytes)
                assert info.file_size == num_bytes(tensor)
            _member(archive, f"{root}/version", b"3\n")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with archive.open(_aligned(archive, name), "w", force_zip64=True) as out:
        out.write(data)


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member whose data will begin at a multiple of 64, by an extra field of padding."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(name.encode()) + 4 + _ZIP64_EXTRA
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def _state_dict(tensors: Mapping[str, Tensor]) -> bytes:
    out = [b"\x80\x02", _ordered_dict(), pickle.MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        out += [_text(name), _tensor(str(key), tensor)]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _tensor(key: str, tensor: Tensor) -> bytes:
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.append(step)
        step *= n
    kind = DTYPE_NAMES[tensor.dtype]
    if kind not in _STORAGES:
        raise ValueError(
            f"{tensor.origin}: dtype {tensor.dtype} cannot be written to a .bin file; use --dtype."
        )
    storage = [
        pickle.MARK,
        _text("storage"),
        _global("torch", _STORAGES[kind]),
        _text(key),
        _text("cpu"),
        _integer(step),
        pickle.TUPLE,
        pickle.BINPERSID,
    ]
    shape = [pickle.MARK, *map(_integer, tensor.shape), pickle.TUPLE]
    steps = [pickle.MARK, *map(_integer, reversed(strides)), pickle.TUPLE]
    arguments = [*storage, _integer(0), *shape, *steps, pickle.NEWFALSE, _ordered_dict()]
    call = [
        _global("torch._utils", "_rebuild_tensor_v2"),
        pickle.MARK,
        *arguments,
        pickle.TUPLE,
        pickle.REDUCE,
    ]
    return b"".join(call)


def _ordered_dict() -> bytes:
    return _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data
