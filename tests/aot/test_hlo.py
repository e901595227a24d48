"""The parser of compiled programs, on handwritten text and on programs with known FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.aot.census import axes_of, take_census
from dreamllm_jax.aot.hlo import Shape, bits, parse, replica_groups, shapes, trip_count

MESH = {"data": 2, "fsdp": 4}

# A loop over three layers whose weights are in one array. Its product is written as TPUs write it: batch rows
# are a dilated spatial dimension. A kernel has line breaks in its attributes, one of them before a bracket.
TEXT = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={4,8}
}

%one_layer (layers: bf16[3,4,8,16], at: s32[]) -> bf16[4,8,16] {
  %layers = bf16[3,4,8,16]{3,2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %slice = bf16[1,4,8,16]{3,2,1,0} dynamic-slice(%layers, %at), dynamic_slice_sizes={1,4,8,16}
  ROOT %bitcast.1 = bf16[4,8,16]{2,1,0} bitcast(%slice)
}

%body (carried: (s32[], bf16[3,4,8,16], bf16[4,2,8])) -> (s32[], bf16[3,4,8,16], bf16[4,2,8]) {
  %carried = (s32[]{:T(128)}, bf16[3,4,8,16]{3,2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[4,2,8]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%carried), index=0
  %stack = bf16[3,4,8,16]{3,2,1,0} get-tuple-element(%carried), index=1
  %x = bf16[4,2,8]{2,1,0} get-tuple-element(%carried), index=2
  %layer = bf16[4,8,16]{2,1,0} fusion(%stack, %turn), kind=kLoop, calls=%one_layer
  %kernel = f32[2,2]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={
"said":"two lines"
}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","bytes_accessed":"7"}}}
  %product = bf16[4,2,16]{2,1,0} convolution(%x, %layer), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  %gathered = bf16[4,2,32]{2,1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={2}
  ROOT %out = (s32[], bf16[3,4,8,16], bf16[4,2,8]) tuple(%turn, %stack, %x)
}

%condition (carried: (s32[], bf16[3,4,8,16], bf16[4,2,8])) -> pred[] {
  %carried.1 = (s32[], bf16[3,4,8,16], bf16[4,2,8]) parameter(0)
  %limit = s32[] constant(4)
  %turn.1 = s32[] get-tuple-element(%carried.1), index=0
  ROOT %less = pred[] compare(%turn.1, %limit), direction=LT
}

ENTRY %main (layers: bf16[3,4,8,16], x: bf16[4,2,8], g: f32[16,8]) -> f32[4,8] {
  %layers.1 = bf16[3,4,8,16]{3,2,1,0} parameter(0)
  %x.1 = bf16[4,2,8]{2,1,0} parameter(1)
  %g = f32[16,8]{1,0} parameter(2)
  %one = s32[] constant(1)
  %start = (s32[], bf16[3,4,8,16], bf16[4,2,8]) tuple(%one, %layers.1, %x.1)
  %loop = (s32[], bf16[3,4,8,16], bf16[4,2,8]) while(%start), condition=%condition, body=%body
  %moved = (bf16[4,2,8], bf16[4,2,8], u32[], u32[]) collective-permute-start(%x.1), source_target_pairs={{0,4},{4,0}}
  %done = bf16[4,2,8]{2,1,0} collective-permute-done(%moved)
  ROOT %scattered = f32[4,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_shapes():
    assert shapes("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[], /*index=2*/f32[<=3]{0})") == (
        Shape("bf16", (4, 8), in_hbm=False),
        Shape("s32", ()),
        Shape("f32", (3,)),
    )
    assert [bits(name) for name in ("pred", "s4", "bf16", "f8e4m3fn", "c64")] == [8, 4, 16, 8, 64]


def test_a_program_is_counted_with_its_loops():
    program = parse(TEXT)
    main = program.computations[program.entry]
    assert trip_count(program, main.instructions["loop"], main) == 3  # from 1 to below 4

    census = take_census(program, MESH)
    assert census.flops == {"other": 3 * (100 + 2 * 4 * 2 * 8 * 16)}  # the batch is counted once, not 4 times
    found = {(c.kind, c.axes): (c.times, c.group, c.received) for c in census.collectives}
    assert found == {
        ("all-gather", ("fsdp",)): (3, 4, 3 * 3 / 4 * 4 * 2 * 32 * 2),
        ("collective-permute", ("data",)): (1, 2, 4 * 2 * 8 * 2),
        ("reduce-scatter", ("fsdp",)): (1, 4, 3 / 4 * 16 * 8 * 4),
    }
    x, layer = 4 * 2 * 8 * 2, 4 * 8 * 16 * 2
    turn = 2 * layer + 4 + 7 + (x + layer + 4 * 2 * 16 * 2) + (x + 4 * 2 * 32 * 2)
    assert census.hbm == 3 * turn + 2 * x + (16 * 8 + 4 * 8) * 4
    assert not census.data_dependent_loops


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")
    with pytest.raises(ValueError, match="cannot be parsed: .*%x = "):
        parse("ENTRY %main () -> s32[] {\n  %x = s32[] 7\n}")
    with pytest.raises(ValueError, match="an unknown form: replica_groups=new"):
        replica_groups("replica_groups=new<1>", 8)


@pytest.mark.parametrize(
    ("written", "groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp",)),
        ("replica_groups={}", [list(range(8))], ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ("replica_groups=[1,8]<=[8]", [list(range(8))], ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp",)),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            ("data",),
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [list(range(8))], ("data", "fsdp")),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]], ("fsdp",)),
    ],
)
def test_replica_groups(written, groups, axes):
    found = replica_groups(written, 8)
    np.testing.assert_array_equal(found, groups)
    assert axes_of(found, MESH) == axes


def test_the_flops_are_those_that_xla_counts():
    """Compares a strided convolution, its gradients and a product with XLA's count, a scan by hand."""

    def loss(kernel, x, w):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y.reshape(2, -1) @ w).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 3, 4, 8), (2, 10, 10, 4), (200, 16))]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    counted = take_census(parse(compiled.as_text()), MESH).total_flops
    xla = compiled.cost_analysis()["flops"]
    assert 0.9 * xla < counted <= xla  # XLA also counts elementwise additions

    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    compiled = jax.jit(layers).lower(jnp.ones((64, 128)), jnp.ones((5, 128, 128))).compile()
    assert take_census(parse(compiled.as_text()), MESH).total_flops == 5 * 2 * 64 * 128 * 128


def test_a_loop_that_data_end_is_counted_once_and_named():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.max() > 1, lambda x: x @ jnp.full((128, 128), 1e-3), x)

    census = take_census(parse(jax.jit(halve).lower(jnp.ones((64, 128))).compile().as_text()), MESH)
    assert len(census.data_dependent_loops) == 1 and census.total_flops == 2 * 64 * 128 * 128
