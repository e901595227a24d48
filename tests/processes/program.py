"""What test_together.py starts as one process and as two: trains, is asked to end, goes on, generates.

python program.py FOLDER RECIPE.json: leaves FOLDER/run, and FOLDER/<process>.json with what was generated.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from dreamllm_jax import DreamLLM, processes
from dreamllm_jax.config.train import recipe as build_recipe

ASKED_AT = 3  # the step of the last stage before which the last process gets a SIGTERM
DRAWN = dict(sampler="ddim", num_inference_steps=2)


def main(folder: Path, mapping: dict) -> None:
    processes.initialize()
    import jax

    from dreamllm_jax.sharding import make_mesh
    from dreamllm_jax.train import loop

    recipe, step = build_recipe(mapping), loop.train_step
    last = jax.process_index() == jax.process_count() - 1

    def asked_to_end(state, *args, **options):
        if last and int(state.step) + 1 == ASKED_AT and options["stage"] == recipe.stages[-1].program():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # the others are told; steps this small would be over
        return step(state, *args, **options)

    asked_to_end.lower = step.lower
    loop.train_step, sentence = asked_to_end, None
    try:
        loop.train(recipe, folder / "run")
    except processes.Preempted as notice:
        sentence = str(notice)
    loop.train_step = step
    trained = loop.train(recipe, folder / "run")

    model = DreamLLM.from_pretrained(trained, mesh=make_mesh(recipe.mesh))
    texts = model.generate_text(["Write one plus one.", "Which"], max_new_tokens=8, temperature=1.0, seed=3)
    document = model.generate_document("Count", max_new_tokens=8, max_images=1, **DRAWN)
    (picture,) = model.generate_images("a", guidance_scale=2.0, **DRAWN)
    made = dict(
        devices=[len(jax.local_devices()), jax.device_count()],
        trained=str(trained.relative_to(folder)),
        sentence=sentence,
        texts=texts,
        document=[part if isinstance(part, str) else np.asarray(part).tolist() for part in document],
        picture=np.asarray(picture).tolist(),
    )
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
