"""LLaVA-1.5 7B: the same system without an image decoder.

Reproduces: arXiv 2310.03744: Vicuna-7B v1.5, CLIP ViT-L/14 at 336 px, an mlp projector of depth 2, trained on
558K captions (projector alone, batch 256, 1e-3) and then 665K conversations (with the language model, batch
128, 2e-5), each once. (The reference's projects/llava have 2e-3, 4e-5 and CLIP at 224 px.) Images stand
between `<im_start>` and `<im_end>`, as everywhere here; LLaVA's own files have them bare.
Hardware, time: the authors' README gives 3.5 and 10 hours on 8 A100;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/llava15.py --workdir=runs/llava15

Begins with models/llava-7b-start: Vicuna and CLIP, converted and put together. LLaVA-1.5's conversations and
pictures lie in data/llava-1.5-instruct.
"""

from base_7b import LENGTH, clip, llava_pretrain, loss, mesh, optim, recipe, vicuna15
from ml_collections import ConfigDict


def model() -> dict:
    return dict(
        llama=vicuna15(),
        vision=clip(image_size=336),
        vision_projector=dict(kind="mlp", depth=2),
        vision_select_layer=-2,
        dtype="bfloat16",
        remat=dict(llama="full", vision="full"),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; arg: the folder of models and data (default: the current one)."""
    folder = f"{arg or '.'}/data/llava-1.5-instruct"
    instruct = dict(kind="conversations", path=f"{folder}/llava_v1_5_mix665k.json", images=f"{folder}/images")
    common = dict(mode="comprehension", max_dreams=0)
    stages = [
        dict(
            name="align",
            trainable=("vision_projector",),
            steps=2_181,
            # 256 captions: two a row, each about 680 tokens.
            data=dict(sources=(llava_pretrain(arg, 1.0),), batch_size=128, length=1408, max_images=2)
            | common,
            loss=loss(lm=1.0, vm=0.0),
            optim=optim(1e-3, warmup_ratio=0.03),
        ),
        dict(
            name="instruct",
            trainable=("llama", "vision_projector"),
            steps=5_198,
            # About 128 conversations: two a row.
            data=dict(sources=(instruct,), batch_size=64, length=LENGTH, max_images=3) | common,
            loss=loss(lm=1.0, vm=0.0),
            optim=optim(2e-5, warmup_ratio=0.03),
        ),
    ]
    changes = dict(model=model(), mesh=mesh("vision"), generation=dict(template="vicuna_v1.1"))
    return ConfigDict(recipe("llava15", stages, "llava-7b-start", arg, **changes))
