"""Small programs compiled for GPUs that are not there: FLOPs of libraries, memory, networks, launches."""

import dataclasses
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.aot import compilers
from dreamllm_jax.aot.census import Census, take_census
from dreamllm_jax.aot.compilation import compile_and_report, written
from dreamllm_jax.aot.hlo import parse, parse_thunks
from dreamllm_jax.aot.launches import Launches, count_launches, loops
from dreamllm_jax.aot.memory import Memory, NoText, does_not_fit
from dreamllm_jax.aot.program import LoweredProgram, compile_program, train_program
from dreamllm_jax.aot.report import to_json, to_text
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.aot.topology import axes_within, islands_of, topology_devices
from dreamllm_jax.commands.main import main
from dreamllm_jax.config.chips import CHIPS
from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.sharding import make_mesh
from tests.aot.test_compile import file, recipe  # noqa: F401 (a fixture)
from tests.aot.test_roofline import collective
from tests.train import tiny

# Cached programs cannot be loaded without their devices, so they are compiled again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

LENGTH, ROWS = 512, 8  # cuDNN takes rows of this length


@pytest.fixture(scope="module")
def compiler():
    """Skips the test where JAX's CUDA plugin is not installed."""
    if not any(compilers.version_of(name) for name in compilers.CUDA_PLUGINS):
        pytest.skip(f"JAX's CUDA plugin, the GPU's compiler, is not installed ({compilers.INSTALL})")


@pytest.fixture(scope="module")
def step(compiler):
    """A compiled step of a language model with cuDNN's attention, on two hosts of four GPUs."""
    wanted = recipe(MeshConfig(1, 8), ("llama",), trainable=("llama",))
    stage = wanted.stages[0]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, length=LENGTH, max_images=0))
    llama = dataclasses.replace(wanted.model.llama, max_position_embeddings=LENGTH)
    model = dataclasses.replace(wanted.model, llama=llama, attention=AttentionConfig(llama="cudnn"))
    wanted = dataclasses.replace(wanted, model=model, stages=(stage,))
    program = train_program(wanted, stage, topology_devices("h200:4*2"))
    return compile_and_report(wanted, program, "h200:4*2", "low")


def compiled(function, *shapes, dtype=jnp.bfloat16):
    """Compiles a function of arrays of these shapes (or of lists of such) for one H100; returns its text."""
    device = topology_devices("h100:1")[:1]
    here = NamedSharding(make_mesh(MeshConfig(), device), PartitionSpec())

    def one(shape):
        if isinstance(shape, list):
            return [one(part) for part in shape]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    return jax.jit(function).lower(*map(one, shapes)).compile().as_text()


def test_the_devices_of_a_topology(compiler):
    devices = topology_devices("h100:8*4")
    assert len(devices) == 32 and {d.device_kind for d in devices} == {CHIPS["h100"].kind}
    assert [d.process_index for d in devices] == [host for host in range(4) for _ in range(8)]
    assert {d.platform for d in topology_devices("h200:1")} == {"gpu"}
    mesh = make_mesh(MeshConfig(2, 8, 2), devices)
    assert islands_of(mesh) == 4 and islands_of(mesh, ("tensor",)) == 1 and islands_of(mesh, ("fsdp",)) == 2
    assert axes_within(mesh, mesh.axis_names) == ["fsdp", "tensor"]


def test_the_command_says_what_is_wrong(compiler, file, monkeypatch, capsys):  # noqa: F811
    def message(topology):
        assert main(["compile", file, f"--topology={topology}"]) == 2
        return capsys.readouterr().err

    assert "--topology=b100:8 is unknown" in message("b100:8") and "h100:8*2" in message("h100")
    assert "a host has 1 to 8 GPUs" in message("h100:16") and "such as h100:8" in message("h100:2x2")
    monkeypatch.setattr(compilers, "version_of", {"jaxlib": "0.99", "jax-cuda13-plugin": "0.98"}.get)
    assert "jax-cuda13-plugin 0.98 is installed, but it must have the version of jaxlib" in message("h100:8")
    monkeypatch.setattr(compilers, "version_of", lambda name: "1")
    assert "pip uninstall jax-cuda13-plugin jax-cuda13-pjrt" in message("h100:8")
    monkeypatch.setattr(compilers, "version_of", lambda name: None)
    assert "neither a GPU nor CUDA): pip install 'dreamllm-jax[aot]'" in message("h100:8")


def test_libtpu_must_be_the_one_that_jax_names(monkeypatch):
    asked = 'libtpu==0.0.42.*; extra == "tpu"'
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compilers.importlib.metadata, "requires", lambda name: [asked, "numpy>=2"])
    for version in ("0.0.42", "0.0.42.1"):
        monkeypatch.setattr(compilers, "version_of", {"libtpu": version, "jax": "0.10.2"}.get)
        compilers.check_tpu_compiler()
    monkeypatch.setattr(compilers, "version_of", {"libtpu": "0.0.52", "jax": "0.10.2"}.get)
    with pytest.raises(
        ValueError, match=r"libtpu 0.0.52 is installed, but JAX 0.10.2 needs libtpu==0.0.42.\*: "
    ):
        compilers.check_tpu_compiler()
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed .*\[aot\]"):
        compilers.check_tpu_compiler()


def test_a_step_on_two_hosts(step):
    """All products are counted, those in cuDNN's attention too; the weights' gathers cross both networks.

    Beyond the model's work, the backward pass computes the scores again, but not the logits.
    """
    found, text = step
    assert text.count("__cudnn$fmha") >= 2
    llama = tiny.config().llama
    again = 2 * ROWS * LENGTH * llama.hidden_size * llama.num_hidden_layers * LENGTH
    model = sum(found.program.model_flops.values())
    assert found.compiled_flops == pytest.approx(model + again, rel=0.02)
    assert found.memory.fits and found.memory.kinds["activations"] > 0
    assert {"nvlink fsdp", "network", "hbm", "compute"} == set(found.roofline.seconds)
    launches = found.gpu.launches
    assert launches.graphs > 0 and launches.collectives > 0 and 0 < launches.outside < launches.total
    shown, saved = to_text(found), to_json(found)
    assert "CUDA graphs" in shown and "network" in shown
    assert saved["gpu"]["launches"]["kernels"] == launches.kernels > 50
    assert saved["memory_traffic"] == found.census.hbm > sum(found.memory.kinds.values())
    assert [name for name in saved["compiler"] if "cuda" in name]


def test_convolutions_of_cudnn_count_as_xla_counts_them(compiler):
    """A strided convolution and both of its gradients, beside XLA's count of the same on CPU.

    Nine pixels need the same padding on both sides, as cuDNN does.
    """

    def loss(kernel, x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y**2).sum()

    shapes, grads = [(3, 3, 16, 32), (2, 9, 9, 16)], jax.grad(loss, (0, 1))
    text = compiled(grads, *shapes)
    assert text.count("__cudnn$conv") == 3
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    xla = jax.jit(grads).lower(*given).compile().cost_analysis()["flops"]
    assert 0.9 * xla < take_census(parse(text), {"data": 1}).total_flops <= xla


def test_seconds_between_hosts(compiler):
    """Four hosts of eight: an all-reduce over all crosses each network once; one within a host does not."""
    mesh, chip = make_mesh(MeshConfig(4, 8), topology_devices("h100:8*4")), CHIPS["h100"]
    moved = [
        collective("all-reduce", ("data", "fsdp"), 32, 32e9, 32e9),
        collective("all-gather", ("fsdp",), 8, 1e9, 8e9),
    ]
    both = roofline(Census(collectives=moved), 1.0, mesh, chip).seconds
    assert both["network"] == pytest.approx(2 * 3 / 4 * 4e9 / chip.dcn)
    assert both["nvlink fsdp"] == pytest.approx((2 * 28e9 + 7e9) / (2 * chip.link))
    assert max(both, key=both.get) == "nvlink fsdp"


def test_a_program_that_needs_more_than_the_gpu_has():
    memory = Memory({"parameters": 90 * 2.0**30}, hbm=CHIPS["h100"].hbm)
    assert not memory.fits and does_not_fit("h100:1", memory).startswith(
        "does not fit on h100:1: it needs 90.00 GiB of a chip's 79.10 GiB of memory; use more chips"
    )
    tight = Memory({"parameters": 75 * 2.0**30}, hbm=CHIPS["h100"].hbm)
    assert "5.2% of a chip's 79.10 GiB stays free, and 10% must" in does_not_fit("h100:1", tight)


def test_cublas_computes_products_for_which_triton_has_no_tiles():
    """XLA of JAX 0.10 gives up where it cannot try tiles on a GPU; any other error is raised."""
    lowered, found = mock.Mock(spec=jax.stages.Lowered), mock.Mock(spec=jax.stages.Compiled)
    mesh = make_mesh(MeshConfig())
    refused = jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo")
    lowered.compile.side_effect = [refused, found]
    program = LoweredProgram("train", mesh, {}, {}, lowered)
    assert compile_program(program, "low", Path("dump")) is found
    first, second = (call.kwargs["compiler_options"] for call in lowered.compile.call_args_list)
    assert second == first | {"xla_gpu_enable_triton_gemm": False} and first == {"xla_dump_to": "dump"}
    lowered.compile.side_effect = jax.errors.JaxRuntimeError("INTERNAL: another")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        compile_program(program, "low")


def test_a_program_without_a_text_keeps_its_memory(monkeypatch):
    """As libtpu 0.0.52 ends with JAX 0.10.2, after minutes of compiling."""

    def fails(self):
        raise RuntimeError("RET_CHECK failure: async-update\nmore")

    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    program = LoweredProgram("train", make_mesh(MeshConfig()), {"batch": x}, {}, jax.jit(jnp.sin).lower(x))
    monkeypatch.setattr(jax.stages.Compiled, "as_text", fails)
    with pytest.raises(
        NoText, match="train was compiled in 7 s, but FLOPs, .* are missing, because jax .*: RET_"
    ) as error:
        written(program.lowered.compile(), program, CHIPS["v5e"], 7.0)
    assert "batch" in error.value.known and "4.00 MiB" in error.value.known


# A graph, a loop of three turns with a graph in it, and a branch; the loop's number is in the names.
THUNKS = """
000: kCommandBuffer [source | next=003 (1)]
    001: kGemm [source] kGemm
    002: kCopy [source] kCopy
003: kWhile [prev=000 (1)]
condition:
    004: kCustomKernel [source] compare
  body:
    000: kCommandBuffer [source]
        005: kWhile [source]
condition:
            No thunks.          body:
            007: kCuDnn [source] kCuDnn
        010: kWhile [source]
condition:
            011: kCustomKernel [source] compare
          body:
            012: kCuDnn [source] kCuDnn
    008: kAsyncStart [source] stream=1
        010: kDynamicSliceFusion [source]
            009: kCopy [source] kCopy
    011: kAsyncDone [source]
012: kConditional [source]
  branch_0:
    013: kAllReduceStart [source]
    014: kAllReduceDone [source]
  branch_1:
    015: kKernel [source]
    016: kKernel [source]
"""
NAMES = 'thunk_metadata { thunk_info { profile_annotation: "loop" thunk_id: 3 } thunk_kind: "kWhile" }'
LOOP = """
%body (x: s32[]) -> s32[] {
  ROOT %x = s32[] parameter(0)
}
%condition (x: s32[]) -> pred[] {
  ROOT %true = pred[] constant(true)
}
ENTRY %main (start: s32[]) -> s32[] {
  %start = s32[] parameter(0)
  ROOT %loop = s32[] while(%start), condition=%condition, body=%body, ANNOTATION
}
""".replace("ANNOTATION", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_launches_are_counted_with_their_loops():
    """A loop whose length is not known turns once, and tests its condition: in a graph without the host."""
    thunks, program = parse_thunks(THUNKS, NAMES), parse(LOOP)
    assert [thunk.kind for thunk in thunks] == ["CommandBuffer", "While", "Conditional"]
    first, turn = Launches(1, 1, 0, 2, 1), Launches(kernels=3, copies=1, in_graphs=3, graphs=1)
    assert count_launches(thunks, program) == first + turn.times(3) + Launches(kernels=2, waits=1)
    outer, inner, other = loops(thunks, program)
    assert (outer.turns, outer.in_graph, outer.turn) == (3, False, turn) and turn.outside == 1
    assert (inner.turns, inner.in_graph, inner.turn) == (None, True, Launches(kernels=1, in_graphs=1))
    assert other.turn == Launches(kernels=2, in_graphs=2)
    with pytest.raises(ValueError, match="cannot be parsed: no thunk"):
        parse_thunks("no thunk")
