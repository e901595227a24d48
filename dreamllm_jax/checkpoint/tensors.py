"""Lazy tensors: read on demand from files or memory, or seen through another tensor.

All readers, rules and writers of checkpoints use the protocol `Tensor`: an origin for error messages, a
shape, a dtype, and `read`, which returns the values or some rows of them. Nothing is cached, so a checkpoint
may be larger than memory.

Example, a stack of three layers of which only the second is read:

    layers = Stacked(tuple(FileTensor(...) for _ in range(3)))   # shape [3, D, F]
    layers.read(1, 2)                                            # [1, D, F], one file access
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from dreamllm_jax.checkpoint.byte_ranges import CHUNK_BYTES, ByteRange
from dreamllm_jax.distributed import spans_processes, to_host

Shape = tuple[int, ...]

# The dtype names of the safetensors format, and the numpy (ml_dtypes) dtypes they stand for.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# Threads that read and transform chunks ahead of the writer.
READERS = 2


@runtime_checkable
class Tensor(Protocol):
    """Values that `read(start, stop)` fetches, by rows of the first axis; `origin` says where they are.

    `row_readable` says that reading a few rows costs less than reading all of them.
    """

    @property
    def origin(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def row_readable(self) -> bool: ...
    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray: ...


def is_floating(dtype: np.dtype) -> bool:
    """Returns True for float16/32/64, bfloat16 and float8; numpy alone recognizes only its own types."""
    return np.issubdtype(dtype, np.floating) or dtype in (
        DTYPES["BF16"],
        DTYPES["F8_E4M3"],
        DTYPES["F8_E5M2"],
    )


def num_bytes(tensor: Tensor) -> int:
    """Returns the size of a tensor's values in bytes."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A strided view of a byte range of a file; `start` and `strides` count elements, as in torch."""

    name: str
    storage: ByteRange
    dtype: np.dtype
    shape: Shape
    start: int = 0
    strides: Shape | None = None

    def __post_init__(self):
        if self.strides is not None and self.strides == _contiguous(self.shape):
            object.__setattr__(self, "strides", None)
        steps = zip(self.shape, self.strides or _contiguous(self.shape), strict=True)
        empty = 0 in self.shape
        last = self.start - 1 if empty else self.start + sum((n - 1) * s for n, s in steps)
        negative = self.start < 0 or min(self.shape + (self.strides or ()), default=0) < 0
        if negative or (last + 1) * self.dtype.itemsize > self.storage.size:
            raise ValueError(
                f"{self.origin}: a tensor of shape {self.shape} exceeds its storage of "
                f"{self.storage.size} bytes; the file is damaged."
            )

    @property
    def origin(self) -> str:
        return f"{self.storage.file}: {self.name or 'the tensor'}"

    @property
    def row_readable(self) -> bool:
        return bool(self.shape)

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        start, stop, shape = _rows(self.shape, start, stop)
        strides = self.strides or _contiguous(self.shape)
        first = self.start + (start * strides[0] if shape else 0)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        count = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        item = self.dtype.itemsize
        flat = self.storage.read(first * item, (first + count) * item).view(self.dtype)
        if self.strides is None:
            return flat.reshape(shape)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in strides]).copy()


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """An array in memory: numpy, or a jax.Array that is copied from its devices when read."""

    name: str
    array: Any

    @property
    def origin(self) -> str:
        return self.name

    @property
    def row_readable(self) -> bool:
        return bool(self.shape)

    @property
    def shape(self) -> Shape:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        return to_host(self.array, start, stop)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A tensor seen through a function that only rearranges its elements (transpose, squeeze)."""

    base: Tensor
    function: Callable[[np.ndarray], np.ndarray]
    row_readable = False

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def shape(self) -> Shape:
        # A broadcast scalar takes any shape without allocating memory.
        return self.function(np.broadcast_to(np.zeros((), np.uint8), self.base.shape)).shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        mapped = self.function(self.base.read())
        return mapped if start is None and stop is None else mapped[start:stop]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tensors of one dtype, seen through a function that makes one of them by rearranging their elements."""

    parts: tuple[Tensor, ...]
    function: Callable[..., np.ndarray]
    row_readable = False

    @property
    def origin(self) -> str:
        return " and ".join(part.origin for part in self.parts)

    @property
    def shape(self) -> Shape:
        zero = np.zeros((), np.uint8)
        return self.function(*(np.broadcast_to(zero, part.shape) for part in self.parts)).shape

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        joined = self.function(*(part.read() for part in self.parts))
        return joined if start is None and stop is None else joined[start:stop]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors of equal shape and dtype, stacked along a new first axis."""

    parts: tuple[Tensor, ...]
    row_readable = True

    @property
    def origin(self) -> str:
        return f"{self.parts[0].origin} (and {len(self.parts) - 1} more layers)"

    @property
    def shape(self) -> Shape:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        rows = self.parts[start:stop]
        if len(rows) == 1:
            return contiguous(rows[0].read())[None]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for i, part in enumerate(rows):
            out[i] = contiguous(part.read())
        return out


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry of another tensor's first axis."""

    base: Tensor
    index: int
    row_readable = False

    @property
    def origin(self) -> str:
        return f"{self.base.origin}[{self.index}]"

    @property
    def shape(self) -> Shape:
        return self.base.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        row = self.base.read(self.index, self.index + 1)[0]
        return row if start is None and stop is None else row[start:stop]


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor made from one other; unless a subclass says otherwise, it differs only in how it is read."""

    base: Tensor

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def row_readable(self) -> bool:
        return self.base.row_readable

    @property
    def shape(self) -> Shape:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype


@dataclasses.dataclass(frozen=True)
class Cast(Derived):
    """A tensor converted to another floating dtype; integers and booleans are unchanged."""

    to: np.dtype

    @property
    def dtype(self) -> np.dtype:
        return self.to if is_floating(self.base.dtype) else self.base.dtype

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        return self.base.read(start, stop).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class DeliveredTensor(Derived):
    """A tensor whose chunks another thread reads and delivers, in the order of `chunk_ranges`."""

    next_chunk: Callable[[], np.ndarray]

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        return self.next_chunk()


def spanning_array(tensor: Tensor) -> Any | None:
    """Returns the jax.Array of a tensor whose values are divided among processes, or None.

    All processes must take part in reading such a tensor: see `distributed.gather_rows`.
    """
    base = tensor.base if isinstance(tensor, Cast) else tensor
    return base.array if isinstance(base, ArrayTensor) and spans_processes(base.array) else None


def contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the array in row-major order; transposed matrices are copied in strips that fit the cache.

    numpy's own copy of a large transposed matrix misses the cache at nearly every element, which is several
    times slower.
    """
    if array.ndim != 2 or array.flags.c_contiguous or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    strip = max(8, 32 // array.dtype.itemsize)
    for start in range(0, array.shape[1], strip):
        out[:, start : start + strip] = array[:, start : start + strip]
    return out


def chunk_ranges(tensor: Tensor) -> list[tuple[int | None, int | None]]:
    """Returns the (start, stop) rows of the chunks in which a tensor is streamed, in order.

    A chunk is about `CHUNK_BYTES` of complete rows. A small tensor, or one that is not row-readable, is one
    chunk: [(None, None)].
    """
    if num_bytes(tensor) <= CHUNK_BYTES or not tensor.row_readable:
        return [(None, None)]
    return [*row_ranges(tensor, 0, tensor.shape[0])]


def _read_chunk(tensor: Tensor, start: int | None, stop: int | None) -> np.ndarray:
    return contiguous(tensor.read(start, stop))


def row_ranges(tensor: Tensor, start: int, stop: int) -> list[tuple[int, int]]:
    """Returns ranges that cover rows start..stop: about `CHUNK_BYTES` each, or one if not row-readable."""
    if not tensor.row_readable:
        return [(start, stop)]
    rows = max(1, CHUNK_BYTES * tensor.shape[0] // max(num_bytes(tensor), 1))
    return [(first, min(first + rows, stop)) for first in range(start, stop, rows)]


def stream_chunks(tensors: Iterable[Tensor]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of the tensor, its next chunk) in order. Threads read a few chunks ahead."""
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for number, tensor in enumerate(tensors):
                submit = _read_in_this_thread if isinstance(tensor, DeliveredTensor) else pool.submit
                for start, stop in chunk_ranges(tensor):
                    waiting.append((number, submit(_read_chunk, tensor, start, stop)))
                    if len(waiting) > READERS:
                        done, future = waiting.popleft()
                        yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read_in_this_thread(read: Callable[..., np.ndarray], *arguments: Any) -> Future:
    """Reads at once, so that delivered chunks keep their order."""
    future: Future = Future()
    future.set_result(read(*arguments))
    return future


def _contiguous(shape: Sequence[int]) -> Shape:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _rows(shape: Shape, start: int | None, stop: int | None) -> tuple[int, int, Shape]:
    if not shape:
        return 0, 0, shape
    start, stop, _ = slice(start, stop).indices(shape[0])
    return start, stop, (max(stop - start, 0), *shape[1:])
