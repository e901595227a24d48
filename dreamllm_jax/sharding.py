"""How arrays are sharded over devices: meshes, two tables of rules, and `constrain`.

The path of a parameter selects its logical axes (`PARAMETER_RULES`), and a logical axis selects mesh axes
(`LOGICAL_AXIS_RULES`). The mesh axes are

    data     copies of the model; the only axis that may cross the slow network between TPU slices
    fsdp     rows of the batch, and shards of every weight, which are gathered for use
    tensor   attention heads, MLP width and vocabulary
    context  the length of the sequence

Example: two parameters on a mesh of fsdp=2 x tensor=2 devices.

    llama/layers/mlp/up_proj/kernel   [layers, in, out]
        rule          .../up_proj/.../kernel -> (weight_in, weight_out)
        mesh axes     weight_in -> fsdp, weight_out -> tensor
        result        PartitionSpec(None, ("fsdp",), ("tensor",)): a device holds a quarter of every matrix

    llama/norm/scale                  [width]
        rule          .../scale -> ()
        result        PartitionSpec(): a device holds all of it

Image towers (CLIP, U-Net, VAE) have no long axis to shard, but many images. Their images are spread over
all four mesh axes, as far as the number of images is divisible.

Nothing is replicated by accident. It is an error if a parameter matches no rule or rules with different axes,
if no parameter uses a rule (the tests check this), or if the mesh axes do not divide a dimension.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dreamllm_jax.config.train import MeshConfig

T = TypeVar("T")

MESH_AXIS_NAMES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
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

# Kernels are [in, out]. The names are Megatron-LM's (arXiv 1909.08053, section 3).
_COLUMN_PARALLEL = ("weight_in", "weight_out")  # tensor splits the output: heads, MLP width
_ROW_PARALLEL = ("weight_out", "weight_in")  # tensor splits the input: projections back to the model's width
_CONV = ("replicated", "replicated", "weight_in", "weight_out")

# Each row is a regular expression for the full path and the logical axes of the trailing dimensions. Leading
# dimensions that a row does not name are stacks of scanned layers and are not sharded.
PARAMETER_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # all vectors: norms, biases, the scales of int8 kernels, the class token, the temperature
    (r".*/(scale|bias|kernel_scale|class_embedding|logit_scale)", ()),
    # embeddings and heads
    (r"llama/embed_tokens/embedding", _ROW_PARALLEL),
    (r"llama/lm_head/kernel", _COLUMN_PARALLEL),
    (r".*/(token_embedding|position_embedding)/embedding", ("replicated", "weight_in")),
    (r"dream_queries/dream_queries", ("replicated", "weight_in")),
    # transformer layers of every tower
    (r".*/(q_proj|k_proj|v_proj|to_q|to_k|to_v|gate_proj|up_proj|fc1|net_0/proj)/kernel", _COLUMN_PARALLEL),
    # joined for generation (see generate.layout); gate and up are an axis of their own
    (r"llama/layers_\d+/self_attn/qkv_proj/kernel", _COLUMN_PARALLEL),
    (r"llama/layers_\d+/mlp/gate_up_proj/kernel", ("weight_in", "replicated", "weight_out")),
    (r".*/(o_proj|out_proj|to_out_0|down_proj|fc2|net_2)/kernel", _ROW_PARALLEL),
    (r".*/(visual_projection|text_projection)/kernel", _COLUMN_PARALLEL),
    # projectors
    (r"(vision_projector|condition_projector|global_projector)/linear_\d+/kernel", _COLUMN_PARALLEL),
    (r"(vision_projector|condition_projector)/conv_\d+/kernel", _CONV),
    # U-Net and VAE; the 3, 4 or 8 channels of images and latents are too few to shard
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
    (r"unet/.*/(linear_1|linear_2|time_emb_proj)/kernel", _COLUMN_PARALLEL),
    (r"unet/.*attentions_\d+/(proj_in|proj_out)/kernel", _COLUMN_PARALLEL),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Returns the mesh of `devices`, by default all of them. One axis may be -1: the remaining devices.

    Raises:
      ValueError: the product of the axes is not the number of devices, or more than one axis is -1.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor, config.context]
    given = dict(zip(MESH_AXIS_NAMES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh {given}: sizes must be positive, and at most one may be -1 (the rest).")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes and len(devices) % known:
        raise ValueError(
            f"mesh {given}: the product of the sizes is {known}, which does not divide the {len(devices)} "
            "devices; reduce one of them, for example --config.mesh.fsdp=8."
        )
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {given} does not match the {len(devices)} devices; the product of its axes must be "
            f"{len(devices)}, or one of them -1."
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXIS_NAMES)
    return Mesh(arrange_devices(sizes, devices), MESH_AXIS_NAMES, axis_types=axis_types)


def arrange_devices(sizes: Sequence[int], devices: list[Any]) -> np.ndarray:
    """Returns the devices as an array of shape `sizes`, such that neighbours are close in the network.

    For several TPU slices, `data` uses the network between them and all other axes use the links within a
    slice. Devices of other kinds keep their order, in which those of one host are consecutive.

    Raises:
      ValueError: `data` is not divisible by the number of slices.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    # Devices of an abstract topology may have no slice_index.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data is {sizes[0]} on {slices} slices; every slice holds full copies of the model: choose "
            f"a multiple of {slices}."
        )
    inside = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    between = (slices, *(1,) * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def platform() -> str:
    """Returns the platform of the program that is being traced: "cpu", "gpu" or "tpu".

    It is that of the current mesh, whose devices may be abstract, or else of JAX's default backend.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def activation_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Returns the PartitionSpec of an activation with these logical axes.

    A mesh axis is skipped if an earlier dimension uses it, or if it does not divide what remains of the
    dimension.

    Example: queries of a vision tower, [images, patches, heads, width], on a mesh of fsdp=2 x tensor=2.
    "images" may use fsdp and tensor, "heads" may use tensor.

        shape (4, 9, 2, 8)   (("fsdp", "tensor"), None, None, None)
        shape (2, 9, 2, 8)   (("fsdp",), None, ("tensor",), None)
    """
    used: set[str] = set()
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        names = []
        for name in LOGICAL_AXIS_RULES[axis] if axis is not None else ():
            if mesh.shape[name] > 1 and name not in used and size % mesh.shape[name] == 0:
                names.append(name)
                size //= mesh.shape[name]
        used.update(names)
        spec.append(tuple(names) or None)
    return PartitionSpec(*spec)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec as a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x with its sharding constrained by logical axes on the current mesh; x itself without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    assert len(axes) == x.ndim, f"{len(axes)} axes for an array of shape {x.shape}"
    return jax.lax.with_sharding_constraint(x, activation_spec(axes, x.shape, mesh))


def path_string(path: tuple[Any, ...]) -> str:
    """Returns a key path of jax.tree_util as a string such as "llama/norm/scale"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def match_rule(path: str) -> tuple[str, tuple[str, ...]]:
    """Returns the row of `PARAMETER_RULES` that matches a parameter's path.

    Raises:
      ValueError: no row matches, or rows with different axes match.
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
    """Returns the PartitionSpec of one parameter. With `gathered` it is not sharded along fsdp.

    Raises:
      ValueError: no rule matches the path, or a dimension is not divisible by its mesh axes.
    """
    axes = match_rule(path)[1]
    assert len(axes) <= len(shape), f"{path}: rule {axes} is longer than the shape {shape}"
    if not axes:
        return PartitionSpec()
    spec: list[tuple[str, ...] | None] = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(spec) :], axes, strict=True):
        names = tuple(n for n in LOGICAL_AXIS_RULES[axis] if mesh.shape[n] > 1)
        if gathered:
            names = tuple(n for n in names if n != "fsdp")
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
    """Returns NamedShardings for a tree of parameters (arrays or ShapeDtypeStructs), in the same structure.

    The parts of the model named in `replicated` are replicated along fsdp.
    """

    def one(path: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path, shape, mesh, path.split("/")[0] in replicated))

    return jax.tree_util.tree_map_with_path(lambda p, x: one(path_string(p), x.shape), params)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of rows: its first axis is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_row_indices(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that this process must read: those of its own devices, in order.

    If devices of several processes hold the same row (`tensor` or `context` spans hosts), each of these
    processes reads it.

    Raises:
      ValueError: the batch size is not divisible by data x fsdp.
    """
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % split:
        raise ValueError(
            f"A batch of {batch_size} rows is not divisible by data x fsdp = {split} devices; "
            "choose a multiple of it."
        )
    indices: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    slices = indices.values()
    return sorted({row for (cut,) in slices for row in range(*cut.indices(batch_size))})


def shard_batch(batch: T, mesh: Mesh, batch_size: int | None = None) -> T:
    """Returns global arrays of `batch_size` rows from this process's rows (numpy, see `process_row_indices`).

    A single process may omit `batch_size`.

    Raises:
      ValueError: the batch size is not divisible by data x fsdp.
    """
    total = len(jax.tree.leaves(batch)[0]) if batch_size is None else batch_size
    held, sharding = process_row_indices(mesh, total), batch_sharding(mesh)

    def put(x: Any) -> jax.Array:
        assert len(x) == len(held), f"{len(x)} rows; this process has {len(held)} of {total}"

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            begin = bisect.bisect_left(held, start)  # a device's rows are consecutive here too
            return np.asarray(x[begin : begin + stop - start])

        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)
