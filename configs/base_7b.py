"""The 7B system that the stages share: its towers, and what every recipe of it has in common.

Reproduces: the composition of arXiv 2309.11499: Vicuna-7B v1.1, CLIP ViT-L/14 (224 px), Stable Diffusion
2.1-base (512 px), joined by linear projectors and 64 dream queries; bf16, AdamW as there.
Hardware, time: see the stages. This file trains nothing itself; run it to see that it is sound:
Command: python -c "from dreamllm_jax.config.recipe_files import *; load_recipe('configs/base_7b.py')"

Stages read and write below one folder, the current one or the recipe's argument
(`--config=configs/stage2.py:/mnt/all`):

    models/dreamllm-7b-start   Vicuna, CLIP and Stable Diffusion, converted and put together
    models/...                 what a stage begins with: the folder `model` of the stage before
    data/...                   the data, as each recipe lists it

Batches: the published ones hold 1,024 documents, each padded to a row of its own. Rows are packed here, so
`rows` is chosen for about 1,024 documents a step, and the published steps and learning rates hold as they
are. Only where documents fill their rows (stage II) are there 1,024 rows of 2,048 tokens.
"""

from ml_collections import ConfigDict

LENGTH = 2048
SPECIAL_TOKENS = 8
CONNECTORS = ("vision_projector", "dream_queries", "condition_projector")


def vicuna() -> dict:
    """Vicuna-7B v1.1 (LLaMA), with the special tokens as further rows."""
    return dict(
        vocab_size=32000 + SPECIAL_TOKENS,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


def vicuna15() -> dict:
    """Vicuna-7B v1.5 (LLaMA 2): the same network, for longer documents."""
    return vicuna() | dict(max_position_embeddings=4096, rms_norm_eps=1e-5)


def clip(image_size: int = 224) -> dict:
    """The vision tower of CLIP ViT-L/14."""
    return dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=768,
    )


def stable_diffusion() -> dict:
    """The U-Net, VAE and schedule of Stable Diffusion 2.1-base."""
    return dict(
        unet=dict(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        vae=dict(block_out_channels=(128, 256, 512, 512), sample_size=512, scaling_factor=0.18215),
        schedule=dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        image_size=512,
    )


def model() -> dict:
    return dict(
        llama=vicuna(),
        vision=clip(),
        vision_projector=dict(kind="linear"),
        vision_select_layer=-2,
        num_dream_queries=64,
        condition_projector=dict(kind="linear", bias=False),
        **stable_diffusion(),
        dtype="bfloat16",
        remat=dict(llama="full", vision="full", unet="full"),
        # For its memory: XLA holds the scores of whole rows and pictures, in float32 on TPUs. See
        # `python -m benchmarks.kernels --size=full --topology=v5e:2x2`.
        attention=dict(llama="lean", unet="lean", vae="lean"),
    )


def optim(learning_rate: float, **changes) -> dict:
    """The reference's AdamW: the defaults of the Hugging Face trainer, 0.3 % warm-up, then a cosine."""
    return (
        dict(
            learning_rate=learning_rate,
            warmup_ratio=0.003,
            schedule="cosine",
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
        )
        | changes
    )


def mesh(*replicated: str) -> dict:
    """Weights sliced over 16 neighbours, and as many copies of that as there are devices.

    16 chips are a ring, or a plane, of a TPU's torus; over more than that XLA sums whole gradients instead of
    scattering them. The frozen towers of pictures, 2.5 GB, are whole on every device, and never gathered. On
    fewer devices: `--config.mesh.fsdp=8`.
    """
    return dict(data=-1, fsdp=16, replicated=replicated or ("unet", "vae", "vision"))


def loss(lm: float, vm: float) -> dict:
    return dict(weight_lm=lm, weight_vm=vm)


def recipe(name: str, stages: list[dict], start: str, root: str | None, **changes) -> dict:
    """A recipe that begins with `root/models/<start>`, weights and tokenizer."""
    folder = f"{root or '.'}/models/{start}"
    return (
        dict(
            name=name,
            model=model(),
            stages=stages,
            init_from=folder,
            tokenizer=dict(path=folder),
            mesh=mesh(),
            frozen_dtype="bfloat16",
            checkpoint_every=500,
        )
        | changes
    )


def creation_stage(sources: tuple, trainable: tuple) -> dict:
    """Stage I's second half, for any image decoder: captions are drawn, 30M pairs once."""
    # A pair is about 90 tokens; 8 a row leave room for long captions.
    data = dict(
        sources=sources, mode="creation", batch_size=128, length=LENGTH // 2, max_images=0, max_dreams=8
    )
    return dict(
        name="stage1_creation",
        trainable=trainable,
        steps=29_000,
        data=data,
        loss=loss(lm=0.0, vm=1.0),
        optim=optim(2e-3),
    )


# Data. Weights are documents, in millions; what counts is their ratio.


def blip_laion(root: str | None, weight: float) -> dict:
    return dict(kind="pairs", path=f"{root or '.'}/data/blip-laion/*.tar", weight=weight)


def laion400m(root: str | None, weight: float) -> dict:
    return dict(kind="pairs", path=f"{root or '.'}/data/laion400m/*.tar", weight=weight)


def laion_coco(root: str | None, weight: float) -> dict:
    return dict(kind="pairs", path=f"{root or '.'}/data/laion-coco/*.tar", weight=weight)


def llava_pretrain(root: str | None, weight: float) -> dict:
    folder = f"{root or '.'}/data/llava-pretrain"
    return dict(
        kind="conversations",
        path=f"{folder}/blip_laion_cc_sbu_558k.json",
        images=f"{folder}/images",
        weight=weight,
    )


def mmc4(root: str | None, weight: float) -> dict:
    folder = f"{root or '.'}/data/mmc4-core"
    return dict(
        kind="interleaved",
        path=f"{folder}/*.jsonl",
        images=f"{folder}/images",
        min_similarity=0.25,
        weight=weight,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """The system, its connectors to be trained, without data; arg: the folder of models and data."""
    stage = dict(name="connectors", trainable=CONNECTORS, steps=1, data={}, optim=optim(2e-3))
    return ConfigDict(recipe("base_7b", [stage], "dreamllm-7b-start", arg))
