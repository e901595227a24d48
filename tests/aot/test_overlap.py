"""Collectives that a schedule hides behind products."""

from dreamllm_jax.aot.hlo import parse
from dreamllm_jax.aot.overlap import Overlap, overlap

# A gather around a product, one around an addition, and one that blocks: 4, 4 and 4 KiB.
TEXT = """HloModule m, is_scheduled=true

%fused (x: f32[16,16], y: f32[16,16]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  ROOT %dot = f32[16,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[16,16]) -> f32[64,16] {
  %a = f32[16,16]{1,0} parameter(0)
  %first = (f32[16,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %product = f32[16,16]{1,0} fusion(%a, %a), kind=kOutput, calls=%fused
  %first_done = f32[64,16]{1,0} all-gather-done(%first)
  %second = (f32[16,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%product), replica_groups={{0,1,2,3}}
  %sum = f32[16,16]{1,0} add(%a, %a)
  %second_done = f32[64,16]{1,0} all-gather-done(%second)
  %third = f32[64,16]{1,0} all-gather(%sum), replica_groups={{0,1,2,3}}
  %after = f32[16,16]{1,0} fusion(%sum, %a), kind=kOutput, calls=%fused
  ROOT %all = f32[64,16]{1,0} add(%first_done, %third)
}
"""


def test_a_gather_is_hidden_if_a_product_runs_before_it_is_done():
    assert overlap(parse(TEXT)) == Overlap(all=3 * 4096.0, hidden=4096.0)


def test_without_collectives_there_is_nothing():
    alone = "\n".join(
        line for line in TEXT.splitlines() if "all-gather" not in line and "ROOT %all" not in line
    )
    assert overlap(parse(alone.replace("%after", "ROOT %after"))) == Overlap(0.0, 0.0)
