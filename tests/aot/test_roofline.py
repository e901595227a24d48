"""The lower bound of a program's time: the links of described networks, and seconds computed by hand."""

import pytest

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.memory import Memory, gib
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.aot.topology import islands_of, links, topology_devices
from dreamllm_jax.config.chips import CHIPS, chip_of
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.sharding import make_mesh


def mesh_of(topology, *sizes):
    pytest.importorskip(
        "libtpu", reason="libtpu, the TPU's compiler, is not installed (pip install 'dreamllm-jax[aot]')"
    )
    return make_mesh(MeshConfig(*sizes), topology_devices(topology))


@pytest.mark.parametrize(
    ("topology", "sizes", "expected"),
    [
        ("v5p:4x4x4", (1, 64), {"fsdp": 6}),  # three rings
        ("v5p:4x4x4", (4, 16), {"data": 2, "fsdp": 4}),
        ("v5p:2x2x1", (1, 4), {"fsdp": 2}),  # two lines of two
        ("v5e:16x16", (4, 64), {"data": 1, "fsdp": 3}),  # a fourth of a ring; the rest of it, and a ring
        ("v5e:4x4", (1, 4, 4), {"fsdp": 1, "tensor": 1}),  # no rings below 16
        ("v4:2x2x1", (1, 4), {"fsdp": 2}),  # a device is a chip
        ("v5e:2x2*2", (2, 4), {"fsdp": 2}),
    ],
)
def test_links(topology, sizes, expected):
    mesh = mesh_of(topology, *sizes)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    assert {axis: links(mesh, (axis,), chip) for axis in expected} == expected
    assert islands_of(mesh) == (2 if topology.endswith("*2") else 1)


def collective(kind, axes, group, operand, result, times=1.0):
    return Collective(kind, axes, group, float(operand), float(result), (), "", times)


def test_seconds_within_a_slice():
    mesh, chip = mesh_of("v5p:4x4x4", 4, 16), CHIPS["v5p"]
    census = Census(
        flops={"llama": 2 * chip.peak},
        hbm=3 * chip.hbm_bandwidth,
        collectives=[
            collective("all-gather", ("fsdp",), 16, 1e9, 16e9, times=2.0),
            collective("reduce-scatter", ("fsdp",), 16, 16e9, 1e9),
            collective("all-reduce", ("data",), 4, 4e9, 4e9),
            collective("all-to-all", ("data",), 4, 4e9, 4e9),
            collective("collective-permute", ("data",), 2, 1e9, 1e9),
        ],
    )
    found = roofline(census, 64 * chip.peak, mesh, chip)
    assert found.seconds == {
        "compute": 2.0,
        "hbm": 3.0,
        "ici fsdp": pytest.approx(3 * 15e9 / 400e9),
        "ici data": pytest.approx(2 * 3e9 / 200e9 + 3e9 / 200e9 + 1e9 / 100e9),
    }
    assert (found.limit, found.bound) == ("hbm", 3.0)
    assert found.mfu(found.bound) == pytest.approx(1 / 3) and found.serial > 5


def test_seconds_between_slices():
    """Two slices of four chips: each chip exchanges its fourth, once to reduce and once to broadcast."""
    mesh, chip = mesh_of("v5e:2x2*2", 2, 4), CHIPS["v5e"]
    both = roofline(
        Census(collectives=[collective("all-reduce", ("data", "fsdp"), 8, 8e9, 8e9)]), 1.0, mesh, chip
    )
    assert both.seconds["dcn"] == pytest.approx(2e9 / chip.dcn)
    assert both.seconds["ici fsdp"] == pytest.approx(2 * 6e9 / (2 * chip.link))
    alone = roofline(Census(collectives=[collective("all-reduce", ("data",), 2, 2e9, 2e9)]), 1.0, mesh, chip)
    assert alone.seconds["dcn"] == pytest.approx(2e9 / chip.dcn) and not alone.seconds.get("ici data")


def test_memory_fits_where_a_tenth_is_free():
    assert Memory({"parameters": 80.0, "temporaries": 10.0}, hbm=100.0).fits
    assert not Memory({"parameters": 80.0, "temporaries": 11.0}, hbm=100.0).fits
    assert [gib(n) for n in (2.0**31, 2.0**21, 512.0)] == ["2.00 GiB", "2.00 MiB", "0.50 KiB"]
