"""Where every array lives: meshes, the two rule tables, and `constrain`.

A parameter's path selects its logical axes (`PARAMETER_RULES`), a logical axis its mesh axes
(`MESH_AXES`). The mesh axes are

    data     whole copies of the model; between slices, whose network is slow, this axis alone
    fsdp     rows of the batch, and slices of every weight, gathered where used
    tensor   heads, MLP width and vocabulary
    context  the length of the sequence

The towers of pictures (CLIP, U-Net, VAE) have no long axis to split but many pictures: theirs are
spread over all four axes, as far as their number divides.

A parameter that no rule or more than one collection of axes fits, a rule that no parameter uses
(checked by the tests), and a dimension that its mesh axes do not divide are errors: nothing is
replicated by accident.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dreamllm_jax.config.train import MeshConfig

MESH_AXIS_NAMES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")

MESH_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "pictures": (*BATCH_AXES, "context", "tensor"),
    "length": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": (),
    "head_dim": (),
    "height": (),
    "width": (),
    "channels": (),
    # parameters
    "weight_in": ("fsdp",),
    "weight_out": ("tensor",),
    "replicated": (),
}

_ROW = ("weight_in", "weight_out")  # [in, out] whose output is split: columns of heads or MLP
_COLUMN = ("weight_out", "weight_in")  # [in, out] whose input is split: the way back to the width
_CONV = ("replicated", "replicated", "weight_in", "weight_out")

# Each row: a regular expression for the whole path, and the logical axes of the trailing
# dimensions. Leading dimensions that a row does not name are stacks of scanned layers: whole.
PARAMETER_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # every vector: norms, biases, the class token, the temperature
    (r".*/(scale|bias|class_embedding|logit_scale)", ()),
    # embeddings and heads
    (r"llama/embed_tokens/embedding", _COLUMN),
    (r"llama/lm_head/kernel", _ROW),
    (r".*/(token_embedding|position_embedding)/embedding", ("replicated", "weight_in")),
    (r"dream_queries/dream_queries", ("replicated", "weight_in")),
    # transformer layers of every tower
    (r".*/(q_proj|k_proj|v_proj|to_q|to_k|to_v|gate_proj|up_proj|fc1|net_0/proj)/kernel", _ROW),
    (r".*/(o_proj|out_proj|to_out_0|down_proj|fc2|net_2)/kernel", _COLUMN),
    (r".*/(visual_projection|text_projection)/kernel", _ROW),
    # projectors
    (r"(vision_projector|condition_projector|global_projector)/linear_\d+/kernel", _ROW),
    (r"(vision_projector|condition_projector)/conv_\d+/kernel", _CONV),
    # U-Net and VAE; image-side channels (3, 4 or 8) are too few to split
    (r"vision/embeddings/patch_embedding/kernel", ("replicated", "replicated", "replicated", "weight_in")),
    (
        r"(unet|vae/encoder|vae/decoder)/conv_in/kernel",
        ("replicated", "replicated", "replicated", "weight_out"),
    ),
    (
        r"(unet|vae/encoder|vae/decoder)/conv_out/kernel",
        ("replicated", "replicated", "weight_in", "replicated"),
    ),
    (r"vae/(quant_conv|post_quant_conv)/kernel", ("replicated",) * 4),
    (r"(unet|vae)/.*/(conv1|conv2|conv_shortcut|conv)/kernel", _CONV),
    (r"unet/.*/(linear_1|linear_2|time_emb_proj)/kernel", _ROW),
    (r"unet/.*attentions_\d+/(proj_in|proj_out)/kernel", _ROW),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The device mesh; at most one axis may be -1 and takes the devices that are left.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor, config.context]
    given = dict(zip(MESH_AXIS_NAMES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {given}: sizes must be positive, and at most one -1 (the devices left).")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes and len(devices) % known:
        raise ValueError(
            f"mesh {given}: the sizes multiply to {known}, which does not divide the {len(devices)} devices; "
            "lower one, for example --config.mesh.fsdp=8."
        )
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {given} does not divide the {len(devices)} devices; the axes must multiply to "
            f"{len(devices)}, or one of them be -1."
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXIS_NAMES)
    return Mesh(arranged(sizes, devices), MESH_AXIS_NAMES, axis_types=axis_types)


def arranged(sizes: Sequence[int], devices: list[Any]) -> np.ndarray:
    """The devices as an array of the mesh's shape, neighbours in it near each other in the network.

    Of TPU slices `data` takes the network between them, all else the links within one. Other devices
    keep their order, in which those of one host follow each other.

    Raises:
      ValueError: `data` is not divisible by the number of slices.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len(
        {getattr(device, "slice_index", 0) for device in devices}
    )  # a described topology may lack it
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data is {sizes[0]} on {slices} slices; between slices only whole copies of the model are "
            f"kept: choose a multiple of {slices}."
        )
    inside = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    between = (slices, *(1,) * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def platform() -> str:
    """What programs are made for: "cpu", "gpu" or "tpu"; the mesh's devices may be described ones only."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def activation_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The PartitionSpec of an activation by its logical axes.

    A mesh axis is left out where an earlier dimension has taken it, or where its devices do not divide
    what is left of the dimension.
    """
    taken: set[str] = set()
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        names = []
        for name in MESH_AXES[axis] if axis is not None else ():
            if mesh.shape[name] > 1 and name not in taken and size % mesh.shape[name] == 0:
                names.append(name)
                size //= mesh.shape[name]
        taken.update(names)
        spec.append(tuple(names) or None)
    return PartitionSpec(*spec)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension's entry in a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes on the mesh set by `jax.set_mesh`; identity without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    assert len(axes) == x.ndim, f"{len(axes)} axes for an array of shape {x.shape}"
    return jax.lax.with_sharding_constraint(x, activation_spec(axes, x.shape, mesh))


def path_string(path: tuple[Any, ...]) -> str:
    """`llama/norm/scale` from a key path of jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def match_rule(path: str) -> tuple[str, tuple[str, ...]]:
    """The one row of `PARAMETER_RULES` for a parameter.

    Raises:
      ValueError: none fits, or rows with different axes fit.
    """
    rows = [row for row in PARAMETER_RULES if re.fullmatch(row[0], path)]
    if not rows:
        raise ValueError(f"Parameter {path!r} matches no row of sharding.PARAMETER_RULES; add one.")
    if len({axes for _, axes in rows}) > 1:
        raise ValueError(
            f"Parameter {path!r} matches several rows: {[r for r, _ in rows]}; make them disjoint."
        )
    return rows[0]


def parameter_spec(path: str, shape: Sequence[int], mesh: Any, gathered: bool = False) -> PartitionSpec:
    """The PartitionSpec of one parameter; `gathered`: as a device computes with it, whole along fsdp.

    Raises:
      ValueError: no rule fits the path, or a dimension is not divisible by its mesh axes.
    """
    axes = match_rule(path)[1]
    assert len(axes) <= len(shape), f"{path}: rule {axes} is longer than the shape {shape}"
    if not axes:
        return PartitionSpec()
    spec: list[tuple[str, ...] | None] = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(spec) :], axes, strict=True):
        names = tuple(n for n in MESH_AXES[axis] if mesh.shape[n] > 1 and not (gathered and n == "fsdp"))
        split = math.prod(mesh.shape[n] for n in names)
        if size % split:
            raise ValueError(
                f"Parameter {path!r} of shape {tuple(shape)}: dimension {size} is not divisible by mesh axes "
                f"{dict((n, mesh.shape[n]) for n in names)}; choose a mesh whose axes divide it, or, for a "
                "frozen tower, name it in mesh.replicated."
            )
        spec.append(names or None)
    return PartitionSpec(*spec)


def parameter_shardings(params: Any, mesh: Mesh, replicated: Sequence[str] = ()) -> Any:
    """NamedShardings for a parameter tree (arrays or ShapeDtypeStructs), in the same structure.

    Of the parts of the model named in `replicated` every group along fsdp holds a copy.
    """

    def one(path: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path, shape, mesh, path.split("/")[0] in replicated))

    return jax.tree_util.tree_map_with_path(lambda p, x: one(path_string(p), x.shape), params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of rows: split on its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_row_indices(mesh: Mesh, batch_size: int) -> list[int]:
    """Which of a global batch's rows this process's own devices hold, in order: those it has to read.

    Where devices of several processes hold the same row (`tensor` or `context` reaches over hosts) each of
    these processes reads it.

    Raises:
      ValueError: the rows are not divisible by the devices that split them.
    """
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % split:
        raise ValueError(
            f"A batch of {batch_size} rows is not divisible by data x fsdp = {split} devices; "
            "choose a multiple as the number of rows."
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (cut,) in slices for row in range(*cut.indices(batch_size))})


def shard_batch(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """Global device arrays of `batch_size` rows from this process's own (numpy, the `process_row_indices`).

    `batch_size` may be left out where there is one process.

    Raises:
      ValueError: the rows are not divisible by the devices that split them.
    """
    total = len(jax.tree.leaves(batch)[0]) if batch_size is None else batch_size
    held, sharding = process_row_indices(mesh, total), batch_sharding(mesh)

    def put(x: Any) -> jax.Array:
        assert len(x) == len(held), f"{len(x)} rows; this process has {len(held)} of {total}"

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            begin = bisect.bisect_left(held, start)  # a device's rows lie side by side here too
            return np.asarray(x[begin : begin + stop - start])

        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)
