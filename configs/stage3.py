"""Stage III: instruction tuning on conversations, instructed documents and pairs.

Reproduces: arXiv 2309.11499, stage III: LLaVA-instruct 80K, InstructMMC4 20K, Instruct-BLIP-LAION 20K, three
epochs, batch 1024 x 2048, learning rate 4e-5, losses 1 and 10.
Argument `released` (`:released` or `:FOLDER,released`) draws as the released config does: LLaVA-1.5's 665K
conversations, 600K pairs of BLIP-LAION, InstructMMC4 20K, once.
Hardware, time: the paper gives 1.5 hours on 128 A800;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage3.py --workdir=runs/stage3

Begins with models/dreamllm-7b-stage2; the result is DreamLLM-7B. Instruct-BLIP-LAION is expected as
conversations whose answers hold `<dream>`; the paper's files of it and of InstructMMC4 were not published.
"""

from base_7b import CONNECTORS, LENGTH, blip_laion, loss, optim, recipe
from ml_collections import ConfigDict


def conversations(root: str | None, name: str, weight: float) -> dict:
    folder = f"{root or '.'}/data/{name}"
    return dict(kind="conversations", path=f"{folder}/*.json", images=f"{folder}/images", weight=weight)


def instruct_mmc4(root: str | None, weight: float) -> dict:
    return dict(
        kind="instructions",
        path=f"{root or '.'}/data/instruct-mmc4/*.json",
        images=f"{root or '.'}/data/mmc4-core/images",
        weight=weight,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; arg: the folder of models and data (default: the current one), `released`, or both."""
    released = arg is not None and arg.split(",")[-1] == "released"
    root = (arg or "").removesuffix("released").removesuffix(",") if released else arg
    if released:
        sources = (
            conversations(root, "llava-1.5-instruct", 0.665298),
            blip_laion(root, 0.6),
            instruct_mmc4(root, 0.020231),
        )
    else:
        sources = (
            conversations(root, "llava-instruct", 0.08),
            instruct_mmc4(root, 0.02),
            conversations(root, "instruct-blip-laion", 0.02),
        )
    # About three documents a row.
    data = dict(sources=sources, mode="joint", batch_size=384, length=LENGTH, max_images=6, max_dreams=6)
    stage = dict(
        name="stage3",
        trainable=("llama", *CONNECTORS),
        steps=1_256 if released else 350,
        data=data,
        loss=loss(lm=1.0, vm=10.0),
        optim=optim(4e-5),
    )
    generation = dict(template="vicuna_v1.1", guidance_scale=7.5)
    return ConfigDict(recipe("stage3", [stage], "dreamllm-7b-stage2", root, generation=generation))
