"""Times generation for a batch of prompts against generation for the same prompts one at a time.

    python -m benchmarks.batching --model=quickstart/checkpoint [--prompts=16] [--rounds=3]

The two are timed alternately in one run. For text, images and documents, prints the median seconds of each
and the median of the ratios (below 1: the batch is faster).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from dreamllm_jax import DreamLLM
from examples.handwriting.words import TRAINING_COUNTS, WORDS, caption, count


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, generate: Callable[[Any, int], object], prompts: list[str], rounds: int) -> None:
    """Times `generate` alternately on all prompts at once and on each prompt alone, and prints one line.

    Both are called once before, to compile.
    """

    def as_batch() -> None:
        generate(prompts, 0)

    def one_by_one() -> None:
        for seed, prompt in enumerate(prompts):
            generate(prompt, seed)

    as_batch()
    one_by_one()
    pairs = [(seconds(as_batch), seconds(one_by_one)) for _ in range(rounds)]
    batch, single = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / s for b, s in pairs)
    print(f"{name:10} batch {batch:7.2f} s   one by one {single:7.2f} s   ratio {ratio:.2f}", flush=True)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder that DreamLLM.from_pretrained loads")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, n = DreamLLM.from_pretrained(arguments.model), arguments.prompts
    captions = [caption(i % len(WORDS)) for i in range(n)]
    stories = [count(*TRAINING_COUNTS[i % len(TRAINING_COUNTS)])[0] for i in range(n)]
    print(f"{n} prompts, median of {arguments.rounds} rounds")
    compare("text", lambda p, s: model.generate_text(p, max_new_tokens=32, seed=s), stories, arguments.rounds)
    compare("images", lambda p, s: model.generate_images(p, seed=s), captions, arguments.rounds)
    compare("documents", lambda p, s: model.generate_document(p, seed=s), stories, arguments.rounds)


if __name__ == "__main__":
    main()
