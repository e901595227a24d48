"""Lowers the programs of a recipe for described devices: the train step, and those of generation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import AttentionConfig, DreamLLMConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.packing import empty_batch
from dreamllm_jax.data.pipeline import row_layout
from dreamllm_jax.generate.decode import DecodeRules, decode_text, prefill
from dreamllm_jax.generate.images import draw_images
from dreamllm_jax.generate.int8 import round_to_int8
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.generate.prompts import bucket_length
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.sharding import batch_sharding, make_mesh, parameter_shardings, replicated
from dreamllm_jax.train.flops import flops, step_flops
from dreamllm_jax.train.recipe_checks import check_attention_kernels, check_batch_size, check_shardings
from dreamllm_jax.train.state import abstract_state
from dreamllm_jax.train.step import train_step

GENERATION = ("prefill", "decode", "denoise")
# Compiler options of TPUs by effort. At low effort a 7B step compiles in about an eighth of the time; FLOPs
# and memory are the same to a few percent. 9 is XLA's EFFORT_O0. The older option
# "exec_time_optimization_effort" is refused by libtpu 0.0.50. 0 means unset, which is full effort. GPUs have
# one effort.
EFFORTS: dict[str, Any] = {"low": {"optimization_level": 9}, "full": {}}
# What XLA of JAX 0.10 says where it finds no Triton tiles for a matrix product and cannot try some on a GPU.
# Then cuBLAS computes the products.
NO_TILES = "Couldn't find output tile sizes"


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """A program before it is compiled.

    `arguments` are its inputs by kind, as shapes with shardings. `model_flops` is the model's own work by
    tower, over all devices, each time the program runs.
    """

    name: str
    mesh: Mesh
    arguments: dict[str, Any]
    model_flops: dict[str, float]
    lowered: jax.stages.Lowered


def compile_program(program: LoweredProgram, effort: str, dump: Path | None = None) -> jax.stages.Compiled:
    """Compiles a program; `effort` is a key of EFFORTS. XLA writes its intermediate texts into the folder
    `dump`, if given.
    """
    return _compiled(
        program.lowered, program.mesh, effort, {} if dump is None else {"xla_dump_to": str(dump)}
    )


def _compiled(
    lowered: jax.stages.Lowered, mesh: Mesh, effort: str, options: Mapping[str, Any]
) -> jax.stages.Compiled:
    if mesh.devices.flat[0].platform == "tpu":
        return lowered.compile(compiler_options=EFFORTS[effort] | options)
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
    return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})


def train_program(recipe: Recipe, stage: StageConfig, devices: list[Any]) -> LoweredProgram:
    """Lowers the train step of a stage, as `train.loop` runs it.

    Raises:
      ValueError: the mesh does not fit the devices, or the parameters, batch or kernels do not fit the mesh.
    """
    mesh = make_mesh(recipe.mesh, devices)
    check_attention_kernels(recipe.model, mesh)
    check_batch_size(stage, mesh)
    params = abstract_params(recipe.model)
    check_shardings(stage, params, mesh, recipe.mesh.replicated)
    state = abstract_state(params, stage, recipe, mesh)
    batch = abstract_batch(recipe, stage, mesh)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        lowered = train_step.lower(
            state, batch, rate, model=DreamLLMModule(recipe.model), stage=stage.compile_key()
        )
    arguments = {
        "parameters": state.trainable,
        "frozen": state.frozen,
        "optimizer": (state.opt_state, state.ema),
        "batch": batch,
    }
    return LoweredProgram(stage.name, mesh, arguments, step_flops(recipe.model, stage), lowered)


def abstract_batch(recipe: Recipe, stage: StageConfig, mesh: Mesh) -> Batch:
    """Returns the shapes and shardings of a stage's batches."""
    layout = row_layout(stage.data, recipe.model, null_dream=stage.loss.condition_dropout > 0)
    sharding, rows = batch_sharding(mesh), stage.data.batch_size

    def one(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(one, empty_batch(1, layout, pad=0))


def generation_program(
    recipe: Recipe, name: str, rows: int, devices: list[Any], quantize: str | None = None
) -> LoweredProgram:
    """Lowers one of GENERATION for `rows` prompts (or images), with weights in the model's dtype.

    Prompts fill the context except for `generation.max_new_tokens`. The decoding loop depends on data, so its
    cost is that of one token. With `quantize="int8"` the language model's kernels are int8, as `DreamLLM`
    holds them.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or the model lacks the tower.
    """
    # A saved model names no attention kernels: `DreamLLM` runs with the default ones.
    config = dataclasses.replace(recipe.model, attention=AttentionConfig())
    recipe, mesh = dataclasses.replace(recipe, model=config), make_mesh(recipe.mesh, devices)
    if config.llama is None or (name == "denoise" and not config.draws):
        raise ValueError(f"--program={name}: the model of recipe {recipe.name!r} has no tower for it.")
    check_attention_kernels(config, mesh)
    flat = _generation_params(config, quantize)
    shardings = parameter_shardings(flat, mesh, recipe.mesh.replicated)
    flat = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in flat.items()}
    params = unflatten_dict(flat, sep="/")
    make = {"prefill": _prefill, "decode": _decode, "denoise": _denoise}[name]
    with jax.set_mesh(mesh):
        run, inputs = make(recipe, mesh, params, rows)
        lowered = run.lower(params, *inputs)
        work = {name: flops(run, params, *inputs)}
    return LoweredProgram(name, mesh, {"parameters": flat, "batch": inputs}, work, lowered)


def _generation_params(config: DreamLLMConfig, quantize: str | None) -> dict[str, Any]:
    """Returns the shapes and dtypes of a model's parameters as `DreamLLM` holds them."""
    assert config.llama is not None
    llama, dtype = config.llama, jnp.dtype(config.dtype)

    def relaid(params: dict[str, Any]) -> dict[str, Any]:
        cast = {path: value.astype(dtype) for path, value in params.items()}
        flat = generation_layout(cast, llama)
        return flat if quantize is None else round_to_int8(flat)

    return jax.eval_shape(relaid, abstract_params(config))


def _prefill(recipe: Recipe, mesh: Mesh, params: Any, rows: int) -> tuple[Any, tuple[Any, ...]]:
    config = recipe.model
    capacity = config.context_length
    length = bucket_length(max(1, capacity - recipe.generation.max_new_tokens), capacity)
    stage = dataclasses.replace(recipe.stages[0].data, length=length, max_images=1, max_dreams=0)
    batch = empty_batch(1, row_layout(stage, config, null_dream=False), pad=0)
    batch = dataclasses.replace(batch, dream_images=None, dream_sizes=None)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    model = DreamLLMModule(config, layered=True)
    return jax.jit(functools.partial(prefill, model=model, capacity=capacity)), (batch,)


def _decode(recipe: Recipe, mesh: Mesh, params: Any, rows: int) -> tuple[Any, tuple[Any, ...]]:
    config, new = recipe.model, recipe.generation.max_new_tokens
    assert config.llama is not None
    vocabulary = config.llama.vocab_size
    read, inputs = _prefill(recipe, mesh, params, rows)
    read, reading_of = _flat(read)
    # The KV cache has the sharding that prefill gives it.
    compiled = _compiled(jax.jit(read).lower(params, *inputs), mesh, "low", {})
    shapes = jax.eval_shape(read, params, *inputs)
    state = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(shapes, compiled.output_shardings, strict=True)
    ]

    def others() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), rows)
        ints, flags = jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool)
        forbidden, number = jnp.zeros(vocabulary, bool), jnp.int32(0)
        temperature, top_p = jnp.float32(0), jnp.float32(1)
        return flags, ints, keys, DecodeRules(forbidden, ints[:1], number, flags, number, temperature, top_p)

    flat_others, others_of = _flat(others)

    def run(params: Any, state: list[Any], others: list[Any]) -> Any:
        model = DreamLLMModule(config, layered=True)
        return decode_text(params, reading_of(state), *others_of(others), model=model, max_new_tokens=new)

    return jax.jit(run, donate_argnums=1), (state, jax.eval_shape(flat_others))


def _flat(function: Callable[..., Any]) -> tuple[Callable[..., list[Any]], Callable[[list[Any]], Any]]:
    """Returns the function with its result flattened to a list of arrays, and the inverse of the flattening.

    Containers whose fields are type-checked as arrays cannot hold shapes.
    """
    structures = []

    def leaves(*inputs: Any) -> list[Any]:
        result = function(*inputs)
        structures.append(jax.tree.structure(result))
        return jax.tree.leaves(result)

    return leaves, lambda values: jax.tree.unflatten(structures[0], values)


def _denoise(recipe: Recipe, mesh: Mesh, params: Any, rows: int) -> tuple[Any, tuple[Any, ...]]:
    config = recipe.model
    assert config.unet is not None
    width, pooled = config.unet.cross_attention_dim, config.unet.pooled_text_dim

    def others():
        context = jnp.zeros((rows, config.num_dream_queries, width), config.dtype)
        condition = (context, None if pooled is None else jnp.zeros((rows, pooled), config.dtype))
        return condition, condition, jax.random.split(jax.random.key(0), rows)

    run = functools.partial(
        draw_images, settings=recipe.generation, model=DreamLLMModule(config, layered=True)
    )
    return jax.jit(run), jax.eval_shape(others)
