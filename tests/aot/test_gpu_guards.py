"""Guards against regressions on GPUs: each holds a property of a compiled program that made it faster."""

import dataclasses

import pytest

from dreamllm_jax.aot.compilation import compile_and_report
from dreamllm_jax.aot.hlo import parse
from dreamllm_jax.aot.products import attention_calls, float32_products, products
from dreamllm_jax.aot.program import generation_program, train_program
from dreamllm_jax.aot.topology import topology_devices
from dreamllm_jax.aot.weights import weight_traffic
from dreamllm_jax.config.model import AttentionConfig, RematConfig
from dreamllm_jax.config.train import MeshConfig
from tests.aot.test_compile import recipe
from tests.aot.test_gpu import compiler  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.usefixtures("compiler"),
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]

LAYERS, LENGTH = 3, 512
LLAMA = dict(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=LENGTH,
)


def report(kind: str, **changes):
    """Compiles a program of a language model in bfloat16 for one H200; returns its report and its text."""
    wanted = recipe(MeshConfig(), ("llama",), trainable=("llama",))
    llama = dataclasses.replace(wanted.model.llama, **LLAMA)
    model = dataclasses.replace(
        wanted.model, llama=llama, dtype="bfloat16", attention=AttentionConfig(), **changes
    )
    stage = wanted.stages[0]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, length=LENGTH, max_images=0))
    wanted = dataclasses.replace(wanted, model=model, stages=(stage,))
    devices = topology_devices("h200:1")
    if kind == "train":
        program = train_program(wanted, stage, devices)
    else:
        program = generation_program(wanted, "decode", 1, devices, None if kind == "decode" else kind)
    return compile_and_report(wanted, program, "h200:1", "low")


@pytest.mark.parametrize("kind", ["decode", "int8"])
def test_a_token_reads_every_weight_once_in_one_graph(kind):
    """No layer is copied out of a stack or cast, and the host launches one graph."""
    found, text = report(kind)
    weights = LAYERS * (4 * 512 * 512 + 3 * 512 * 1024)
    traffic = weight_traffic(parse(text))
    assert (traffic.copied, traffic.cast) == (0, 0)
    width = 1 if kind == "int8" else 2
    assert weights * width < traffic.read < 1.2 * weights * width
    (token,) = (loop for loop in found.gpu.loops if loop.turns is None)
    assert (token.turn.graphs, token.turn.outside) == (1, 0) and token.turn.kernels < 25 * LAYERS + 60


def test_a_step_runs_attention_once_forward_and_once_backward():
    """With remat, the backward pass reads what cuDNN's attention returned and does not run it again."""
    found, text = report("train")
    calls = attention_calls(parse(text))
    assert [call.kernel.backward for call in calls] == [False] * LAYERS + [True] * LAYERS
    assert {(call.kernel.mask, call.kernel.bias) for call in calls} == {("PADDING_CAUSAL", None)}


def test_a_step_copies_no_weights():
    """Without a loop over the layers, the products read the weights where they lie."""
    found = report("train")[0].gpu
    assert LAYERS not in [loop.turns for loop in found.loops]
    assert found.weights.copied == 0


def test_remat_saves_memory_without_a_loop():
    """XLA does not merge the recomputation of unrolled layers with their forward pass."""
    kept, least = (
        report("train", remat=RematConfig(llama=policy), scan_layers=False)[0] for policy in ("none", "full")
    )
    assert least.memory.used < 0.8 * kept.memory.used


def test_a_step_multiplies_in_bfloat16():
    """The gradient of the float32 logits is rounded before it is multiplied by."""
    program = parse(report("train")[1])
    wide = float32_products(program)
    assert sum(p.flops for p in wide) < 0.01 * sum(p.flops for p in products(program)), wide
