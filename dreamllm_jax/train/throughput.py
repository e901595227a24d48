"""How fast a stage runs: tokens, pictures and model FLOPs a second, and how well rows are filled."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.chips import find_device
from dreamllm_jax.distributed import sum_over_processes


class Throughput:
    """Adds up what the steps since the last `read` did; of what compiling took, `restart` forgets.

    Rates are of all devices together where they are per second, and per device where they say so. A tower's
    `mfu` is its share of the devices' bfloat16 peak; they add up to `mfu`, which is known for devices in
    `config.chips` only. Slots without a document or picture are computed, and count there: `pad_share` and
    `picture_pad_share` say how many they are.
    """

    def __init__(self, flops: Mapping[str, float], devices: int, kind: str, slots: int):
        """`flops`: of one step, by tower; `devices` of this kind share it. `slots`: tokens in its rows."""
        self._flops, self._devices, self._step_slots = dict(flops), devices, slots
        device = find_device(kind)
        self._peak = None if device is None else device.peak
        self.restart()

    def restart(self) -> None:
        """Begins to measure anew."""
        self._start, self._steps = time.perf_counter(), 0
        self._slots = self._tokens = self._images = self._dreams = self._pictures = 0

    def count(self, batch: Batch) -> None:
        """Takes one more step's batch: this process's rows of it (numpy)."""
        self._steps += 1
        self._slots += batch.segment_ids.size
        self._tokens += int((batch.segment_ids > 0).sum())
        self._images += int(np.asarray(batch.image_mask).sum())
        self._dreams += int(np.asarray(batch.dream_mask).sum())
        self._pictures += batch.image_mask.size + batch.dream_mask.size

    def read(self) -> dict[str, float]:
        """The rates since the last restart or reading; nothing where there was no step.

        Of several processes, all read.
        """
        seconds, steps = time.perf_counter() - self._start, self._steps
        if not steps:
            return {}
        counts = [self._slots, self._tokens, self._images, self._dreams, self._pictures]
        slots, tokens, images, dreams, pictures = sum_over_processes(counts)
        # Processes count the rows that they hold; where `tensor` reaches over hosts some hold the same.
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
