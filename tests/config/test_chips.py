"""The table of accelerators."""

import pytest

from dreamllm_jax.config.chips import CHIPS, OTHERS, Chip, chip_of, find_device


def test_every_device_is_there_once():
    kinds = [device.kind for device in (*CHIPS.values(), *OTHERS)]
    assert len(set(kinds)) == len(kinds)
    assert all(find_device(kind).kind == kind for kind in kinds)
    assert find_device("cpu") is None


def test_figures_are_plausible():
    """A slip of a unit or of a power of ten would be beyond these."""
    for device in (*CHIPS.values(), *OTHERS):
        assert 1e13 < device.peak < 1e16 and 4e9 < device.hbm < 1e12, device.kind
        assert 50 < device.peak / device.hbm_bandwidth < 1000, device.kind  # FLOPs a byte
    for chip in CHIPS.values():
        assert chip.hbm_bandwidth > chip.link > chip.dcn > 1e9, chip.kind


def test_chips_by_what_jax_calls_them():
    assert isinstance(chip_of("TPU v5 lite"), Chip) and chip_of("TPU v5 lite") is CHIPS["v5e"]
    for kind in ("cpu", "TPU v3"):  # its network is not in the table
        with pytest.raises(ValueError, match=f"no figures of '{kind}'; the table config/chips.py has TPU v4"):
            chip_of(kind)
