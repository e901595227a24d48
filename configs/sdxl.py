"""Stage I, creation, with SDXL as the image decoder: 1024 px, pooled and size conditions.

Reproduces: what the reference's projects/dreamllm_sdxl set out to do (its code cannot run as published):
Vicuna-7B v1.5, CLIP with an mlp projector of depth 2, SDXL base 1.0, and a global projector from the mean of
the query states to SDXL's pooled text embedding; LAION400M 20M and BLIP-LAION 10M, batch 1024, 2e-3.
It differs in one number: 64 dream queries, the paper's best, where the reference's config has 196.
Hardware, time: none published;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/sdxl.py --workdir=runs/sdxl

Begins with models/dreamllm-sdxl-7b-start: Vicuna, CLIP and SDXL, converted and put together. The vision
projector is not trained here; stage1_comprehension.py does that, with this model.
"""

from base_7b import blip_laion, creation_stage, laion400m, model, recipe, vicuna15
from ml_collections import ConfigDict

QUERIES = 64


def sdxl() -> dict:
    """The U-Net and VAE of Stable Diffusion XL base 1.0; its schedule is Stable Diffusion's."""
    return dict(
        unet=dict(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        vae=dict(block_out_channels=(128, 256, 512, 512), sample_size=1024, scaling_factor=0.13025),
        image_size=1024,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; arg: the folder of models and data (default: the current one)."""
    changes = dict(llama=vicuna15(), vision_projector=dict(kind="mlp", depth=2), num_dream_queries=QUERIES)
    sources = (laion400m(arg, 20.0), blip_laion(arg, 10.0))
    stage = creation_stage(sources, ("dream_queries", "condition_projector", "global_projector"))
    return ConfigDict(
        recipe("sdxl", [stage], "dreamllm-sdxl-7b-start", arg, model=model() | changes | sdxl())
    )
