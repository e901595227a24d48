"""The throughput of a stage: tokens, images and model FLOPs per second, and the share of padding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.chips import find_device
from dreamllm_jax.distributed import sum_over_processes


class Throughput:
    """Measures the steps since the last `read`; `restart` discards them, for example the one that compiled.

    Rates per second are of all devices together; `tflops_per_device/<tower>` is per device. `mfu/<tower>` is
    a tower's share of the devices' bfloat16 peak (model FLOPs utilization, arXiv 2204.02311, appendix B);
    `mfu` is their sum. Both exist only for devices in `config/chips.py`. Empty slots of tokens and images are
    computed too, and are part of the FLOPs: `pad_share` and `picture_pad_share` are their shares.
    """

    def __init__(self, flops: Mapping[str, float], devices: int, kind: str, slots: int):
        """`flops` and token `slots` are those of one step, `kind` is JAX's name of the devices."""
        self._flops, self._devices, self._step_slots = dict(flops), devices, slots
        device = find_device(kind)
        self._peak = None if device is None else device.peak
        self.restart()

    def restart(self) -> None:
        """Discards what was measured, and measures from now on."""
        self._start, self._steps = time.perf_counter(), 0
        self._slots = self._tokens = self._images = self._dreams = self._pictures = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the rates. The steps before it must have finished."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        """Adds a step with this batch: the rows of it that this process holds (numpy)."""
        self._steps += 1
        self._slots += batch.segment_ids.size
        self._tokens += int((batch.segment_ids > 0).sum())
        self._images += int(np.asarray(batch.image_mask).sum())
        self._dreams += int(np.asarray(batch.dream_mask).sum())
        self._pictures += batch.image_mask.size + batch.dream_mask.size

    def read(self) -> dict[str, float]:
        """Returns the rates since the last restart or reading, or {} if there was no step.

        All processes must make this call.
        """
        seconds, steps = time.perf_counter() - self._start, self._steps
        if not steps:
            return {}
        counts = [self._slots, self._tokens, self._images, self._dreams, self._pictures]
        slots, tokens, images, dreams, pictures = sum_over_processes(counts)
        # Processes count the rows that they hold. If the axis tensor spans hosts, some hold the same rows.
        share = steps * self._step_slots / slots / seconds
        rates = {
            "steps_per_second": steps / seconds,
            "tokens_per_second": tokens * share,
            "images_per_second": images * share,
            "dreams_per_second": dreams * share,
            "pad_share": 1 - tokens / slots,
        }
        if pictures:
            rates["picture_pad_share"] = 1 - (images + dreams) / pictures
        for tower, flops in self._flops.items():
            rates[f"tflops_per_device/{tower}"] = flops * steps / seconds / self._devices / 1e12
        if self._peak is not None and self._flops:
            for tower in self._flops:
                rates[f"mfu/{tower}"] = rates[f"tflops_per_device/{tower}"] * 1e12 / self._peak
            rates["mfu"] = sum(rates[f"mfu/{tower}"] for tower in self._flops)
        self.restart()
        return rates
