"""PyTorch's `.bin` / `.pt` files without PyTorch: a pickle reader that can build tensors and nothing else.

A file of `torch.save` is a zip archive (stored, not compressed) of one pickle and one member per
storage; before torch 1.6 it was a sequence of pickles followed by the raw storages. The pickle is
executed by a reader that knows the few globals that a state dict needs; any other one is refused
by name, so that no file can run code.

No library does this without PyTorch: safetensors reads its own format only, and Python's `pickle` runs
whatever code a file asks for. `torch.load(weights_only=True)` is as safe, but needs PyTorch, which users of
this package otherwise do without, and does not read single rows of a tensor.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.checkpoint.byte_ranges import ByteRange, Checksums
from dreamllm_jax.checkpoint.tensors import DTYPES, FileTensor, Tensor

MAX_PICKLE_BYTES = 256 * 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# The dtype of each storage class, and of each torch.dtype that files name.
_DTYPES = {
    "Bool": "BOOL",
    "Byte": "U8",
    "Char": "I8",
    "Short": "I16",
    "Int": "I32",
    "Long": "I64",
    "Half": "F16",
    "BFloat16": "BF16",
    "Float": "F32",
    "Double": "F64",
    "Untyped": "U8",
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


class _Inert:
    """A value that a pickle may pass around but neither change nor give attributes to."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("tensors in a checkpoint carry no further state")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("tensors in a checkpoint carry no further state")


class _Call(_Inert):
    """One of the functions below, callable by the pickle."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


def _rebuild(storage: _Inert, start: int, shape: tuple, strides: tuple, *rest: Any) -> _Inert:
    return _Inert((storage.value, int(start), _ints(shape), _ints(strides), None))


def _rebuild_v3(storage: _Inert, start, shape, strides, grad, hooks, dtype: _Inert, *rest: Any) -> _Inert:
    return _Inert((storage.value, int(start), _ints(shape), _ints(strides), dtype.value))


def _parameter(tensor: _Inert, *rest: Any) -> _Inert:
    return tensor


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


_FUNCTIONS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda values=(): tuple(values),
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and tensors that point to storages by key."""

    def __init__(self, stream: io.BufferedIOBase, file: Path):
        super().__init__(stream)
        self.file = file
        self.storages: dict[str, tuple[np.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in _FUNCTIONS:
            return _Call(_FUNCTIONS[full])
        kind = name.removesuffix("Storage")
        if module in ("torch", "torch.storage") and (kind != name or name.islower()) and kind in _DTYPES:
            return _Inert(DTYPES[_DTYPES[kind]])
        raise ValueError(
            f"{self.file}: its pickle asks for {full!r}, which is not part of a tensor; the file is refused "
            "because it could run code. Save the weights as safetensors, or as a plain state dict."
        )

    def persistent_load(self, pid: Any) -> _Inert:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {str(pid)[:80]!r}")
        _, dtype, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if view is not None:  # legacy: a view of another storage, (its key, offset, size)
            raise pickle.UnpicklingError("storage views of torch < 0.4 are not supported")
        self.storages[str(key)] = (dtype.value, int(count))
        return _Inert((str(key), dtype.value))


def read_pickle(file: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a `torch.save` file, unread, and the names of its entries that are not tensors.

    A bare tensor has the name "". A state dict under the key `state_dict`, `model` or `module` is
    found. Reading a tensor checks its checksum.

    Raises:
      ValueError: a truncated or damaged file, one of another kind, or a pickle that asks for
        anything but tensors; with the file's and the offending global's name.
    """
    file = Path(file)
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            if start[:2] == b"PK":
                content, storages = _read_zip(file)
            elif start[:1] == b"\x80":
                stream.seek(0)
                content, storages = _read_legacy(file, stream)
            else:
                raise ValueError(f"{file} is not a file of torch.save (it begins with {start!r}).")
        return _tensors(content, storages)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file} is damaged or is not a file of torch.save: {error}.") from error
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} is damaged, truncated or not a file of torch.save: {reason}.") from error


def _read_zip(file: Path) -> tuple[Any, dict[str, ByteRange]]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{file} is a zip archive, but not one of torch.save (no data.pkl inside).")
        root = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"{file}: its pickle has {members[pickles[0]].file_size} bytes; refused.")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise ValueError(f"{file} was written on a big-endian machine, which is not supported.")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), file)
        content = unpickler.load()
    storages = {}
    with file.open("rb") as stream:
        for key, (dtype, count) in unpickler.storages.items():
            name = f"{root}data/{key}"
            if name not in members:
                raise ValueError(f"{file}: storage {key} is missing in the archive; it is damaged.")
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
                raise ValueError(f"{file}: storage {key} is compressed or too short; it is damaged.")
            checksums = Checksums(max(info.file_size, 1), (info.CRC,))
            storages[key] = ByteRange(file, _data_offset(stream, info), info.file_size, checksums)
    return content, storages


def _data_offset(stream: io.BufferedIOBase, info: zipfile.ZipInfo) -> int:
    """Returns the offset of a member's bytes: after its local header, whose length only the header states."""
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"member {info.filename} has no header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_legacy(file: Path, stream: io.BufferedIOBase) -> tuple[Any, dict[str, ByteRange]]:
    if _TensorUnpickler(stream, file).load() != LEGACY_MAGIC:
        raise ValueError(f"{file} is a pickle, but not one of torch.save.")
    _TensorUnpickler(stream, file).load()  # protocol version
    system = _TensorUnpickler(stream, file).load()
    if not system["little_endian"]:
        raise ValueError(f"{file} was written on a big-endian machine, which is not supported.")
    unpickler = _TensorUnpickler(stream, file)
    content = unpickler.load()
    storages = {}
    for key in _TensorUnpickler(stream, file).load():
        dtype, count = unpickler.storages[str(key)]
        if struct.unpack("<q", stream.read(8))[0] != count:
            raise ValueError(
                f"{file}: storage {key} does not have the size that the pickle states; the file is damaged."
            )
        storages[str(key)] = ByteRange(file, stream.tell(), count * dtype.itemsize)
        stream.seek(count * dtype.itemsize, 1)
    return content, storages


def _tensors(content: Any, storages: dict[str, ByteRange]) -> tuple[dict[str, Tensor], list[str]]:
    if isinstance(content, _Inert):
        return {"": _tensor("", content, storages)}, []
    if not isinstance(content, Mapping):
        raise ValueError(f"the file holds a {type(content).__name__}, not a state dict")
    if not any(isinstance(value, _Inert) for value in content.values()):
        for key in ("state_dict", "model", "module"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    tensors, others = {}, []
    for name, value in content.items():
        if isinstance(value, _Inert) and isinstance(value.value, tuple) and len(value.value) == 5:
            tensors[str(name)] = _tensor(str(name), value, storages)
        elif isinstance(value, Mapping) and any(isinstance(v, _Inert) for v in value.values()):
            raise ValueError(
                f"tensors are nested in {name!r}, one level below the others, which is not supported"
            )
        else:
            others.append(str(name))
    return tensors, others


def _tensor(name: str, handle: _Inert, storages: dict[str, ByteRange]) -> FileTensor:
    (key, storage_dtype), start, shape, strides, dtype = handle.value
    return FileTensor(name, storages[key], dtype or storage_dtype, shape, start, strides)
