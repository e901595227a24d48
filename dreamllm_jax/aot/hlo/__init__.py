"""The text of compiled programs (`compiled.as_text()`), parsed in this package and nowhere else.

In: the text of one optimized HLO module. Out: a `Program` of computations and instructions, and typed
readings of the attributes that `aot` counts with. Never: counts anything itself, or compiles.

XLA promises no stable text format. What is read here was seen from XLA's compilers for CPUs, TPUs and GPUs
(JAX 0.10 to 0.12, libtpu 0.0.42 to 0.0.50). Known limits:

- Text that the parser does not know (an instruction, a form of replica groups) is an error, never skipped.
- A loop's trip count is what the compiler annotates, or the limit of a counter that is compared with a
  constant. Other loops have none (`trip_count` returns None).
- Of a conditional all branches are listed; which one runs is not known.
- Kernels (custom calls) are opaque. Their FLOPs and bytes are those that a Pallas kernel states itself;
  splash attention, which states none, and the calls of cuBLAS and cuDNN (`library`) are recognized by their
  names. A library's scratch memory is not counted.
- Shapes are without the padding of tiles. Memory space S(1) and above is taken as on-chip memory (on GPUs
  S(5) is the host's).
- Which part of the model an instruction belongs to is read from the operation names that JAX writes.
"""

from dreamllm_jax.aot.hlo.attributes import (
    MOVED,
    Convolution,
    contracted_dims,
    convolution,
    cost_estimate,
    is_buffer_allocation,
    is_pass,
    is_unchanged,
    loop_body,
    operation_name,
    splash_kernel,
    trip_count,
    tuple_index,
)
from dreamllm_jax.aot.hlo.library import (
    FusedAttention,
    call_target,
    convolution_roles,
    fused_attention,
    is_library_call,
    library_contracted_dims,
)
from dreamllm_jax.aot.hlo.replica_groups import replica_groups
from dreamllm_jax.aot.hlo.text import Computation, Instruction, Program, Shape, bits, parse, shapes
from dreamllm_jax.aot.hlo.thunks import Thunk, parse_thunks, read_thunks

__all__ = [
    "MOVED",
    "Computation",
    "Convolution",
    "FusedAttention",
    "Instruction",
    "Program",
    "Shape",
    "Thunk",
    "bits",
    "call_target",
    "contracted_dims",
    "convolution",
    "convolution_roles",
    "cost_estimate",
    "fused_attention",
    "is_buffer_allocation",
    "is_library_call",
    "is_pass",
    "is_unchanged",
    "library_contracted_dims",
    "loop_body",
    "operation_name",
    "parse",
    "parse_thunks",
    "read_thunks",
    "replica_groups",
    "shapes",
    "splash_kernel",
    "trip_count",
    "tuple_index",
]
