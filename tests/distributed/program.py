"""test_together.py starts this as two processes and as one: trains, is preempted, resumes, and generates.

python program.py FOLDER RECIPE.json [OTHER] writes FOLDER/run, and FOLDER/<process>.json with what this
process read and generated. Without OTHER, the run is preempted in its last stage, its folder is copied to
FOLDER/ended, and it resumes. With OTHER, such a copy from another number of processes, FOLDER/run is trained
without interruption; the run in OTHER resumes, is preempted, and resumes again.
"""

import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np

from dreamllm_jax import DreamLLM, distributed
from dreamllm_jax.checkpoint.model_folder import open_pretrained
from dreamllm_jax.config.train import Recipe, build_recipe
from dreamllm_jax.evaluate.losses import held_out_losses
from dreamllm_jax.sharding import make_mesh, process_row_indices
from dreamllm_jax.train import loop
from tests.train.test_loop import brief_writer

STEPS = 7  # of the last stage
ASKED_AT = 3  # its step before which the last process gets a SIGTERM
ASKED_AGAIN_AT = 6  # by then all have seen the first one
DRAWN = dict(sampler="ddim", num_inference_steps=2)


def fingerprints(batch) -> list[int]:
    """Returns a checksum of everything in each row of a batch."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    return [zlib.crc32(b"".join(a[i].tobytes() for a in arrays)) for i in range(len(batch.tokens))]


def recorded(stage) -> list[dict[int, int]]:
    """Returns a list that will receive, for every step of a stage, the rows that this process read."""
    seen, shard_batch = [], loop.shard_batch

    def seeing(batch, mesh, rows):
        if batch.tokens.shape[1] == stage.data.length:
            seen.append(dict(zip(process_row_indices(mesh, rows), fingerprints(batch), strict=True)))
        return shard_batch(batch, mesh, rows)

    loop.shard_batch = seeing
    return seen


def ended(recipe: Recipe, run: Path, at: int) -> str:
    """Trains until one process gets a SIGTERM before step `at` of the last stage; returns the message."""
    step, last = loop.train_step, jax.process_index() == jax.process_count() - 1

    def asked_to_end(state, *args, **options):
        if last and int(state.step) + 1 == at and options["stage"] == recipe.stages[-1].compile_key():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # the others are told; steps this small would be over
        return step(state, *args, **options)

    asked_to_end.lower = step.lower
    loop.train_step = asked_to_end
    try:
        loop.train(recipe, run, make_writer=brief_writer)
    except distributed.Preempted as notice:
        return str(notice)
    finally:
        loop.train_step = step
    raise AssertionError("The run was not ended.")


def main(folder: Path, mapping: dict, other: Path | None) -> None:
    distributed.initialize()
    jax.clear_caches = lambda: None  # the run goes on in this process: its programs are not compiled again
    recipe, run = build_recipe(mapping), folder / "run"
    rows = recorded(recipe.stages[-1])
    if other is None:
        sentence = ended(recipe, run, ASKED_AT)
        if distributed.is_main():
            shutil.copytree(run, folder / "ended")
        distributed.barrier("copied")
        trained = loop.train(recipe, run, make_writer=brief_writer)
    else:
        trained = loop.train(recipe, run, make_writer=brief_writer)
        sentence = ended(recipe, other, ASKED_AGAIN_AT)
        loop.train(recipe, other, make_writer=brief_writer)

    model = DreamLLM.from_pretrained(trained, mesh=make_mesh(recipe.mesh))
    texts = model.generate_text(["Write one plus one.", "Which"], max_new_tokens=8, temperature=1.0, seed=3)
    document = model.generate_document("Count", max_new_tokens=8, max_images=1, **DRAWN)
    (picture,) = model.generate_images("a", guidance_scale=2.0, **DRAWN)
    held_out = held_out_losses(trained, open_pretrained(trained), recipe, recipe.stages[-1], batches=2)
    made = dict(
        cached=jax.config.jax_enable_compilation_cache,
        devices=[len(jax.local_devices()), jax.device_count()],
        trained=str(trained.relative_to(folder)),
        sentence=sentence,
        rows=rows,
        texts=texts,
        document=[part if isinstance(part, str) else np.asarray(part).tolist() for part in document],
        picture=np.asarray(picture).tolist(),
        losses=held_out["losses"],
    )
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    asked = [Path(argument) for argument in sys.argv[1:]]
    main(asked[0], json.loads(asked[1].read_text()), asked[2] if len(asked) > 2 else None)
