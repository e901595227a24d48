"""A small DreamLLM on real handwritten digits: everything the 7B system does, in minutes.

Reproduces: the whole method of arXiv 2309.11499 on scikit-learn's 1,797 digits. Stage 0 trains what the
real system downloads (VAE, CLIP, text-conditioned U-Net, language model); stages I, II and III train what
the real ones train, with the joint loss 1 : 10 of the real stage II. What is not as at 7B, besides sizes:
  - stage I has documents too, beside pairs and questions;
  - the language model's own text (`words.py`) has stories laid out as in pictures, with words in
    the slots, and sums beyond the digits: what a query has to say is known before the first one is trained.
    Some of that text stays in stages II and III, so that arithmetic does;
  - empty prompts (condition dropout, for guidance), noisy timesteps preferred, weight decay (2.0
    where the language model is trained), and rates, warm-up (5 %) and b2 for a model of a million weights.
    As at 7B, stages II and III are far gentler than I: at three times these rates the rule of addition, which
    the language model brings along, is lost to the few sums that are drawn.
Hardware: two CPU cores, 4 GiB. Time: `launch/quickstart.sh` measures it, into metrics.json.
Command: python -m dreamllm_jax.train --config=examples/handwriting/config.py --workdir=quickstart
"""

from ml_collections import ConfigDict

VOCABULARY = 512
SOURCE = "examples.handwriting.source:Handwriting"
# Wherever the language model is trained: so strong that addition becomes a rule rather than a list of sums.
DECAY = dict(weight_decay=2.0)


def model() -> dict:
    """Every tower of the 7B system, each small."""
    return dict(
        llama=dict(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=384,
        ),
        vision=dict(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            projection_dim=64,
        ),
        vision_projector=dict(kind="linear"),
        vision_select_layer=-2,
        num_dream_queries=4,
        condition_projector=dict(kind="linear", bias=False),
        unet=dict(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        vae=dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16),
        schedule=dict(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        text=dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=64,
            eos_token_id=2,  # as in old CLIP configs: the highest id, here the padding after </s>
        ),
        contrastive=True,
        image_size=16,
    )


def stage(name: str, trainable: tuple, steps: int, rate: float, data: dict, **settings) -> dict:
    optim = dict(learning_rate=rate, warmup_ratio=0.05, weight_decay=0.01, b2=0.99)
    optim |= settings.pop("optim", {})
    return dict(name=name, trainable=trainable, steps=steps, data=data, optim=optim, **settings)


def captions(rows: int, **options) -> dict:
    """One captioned picture a row: what the towers are pretrained on."""
    options = dict(kinds=dict(captions=1.0)) | options
    shape = dict(batch_size=rows, length=16, max_images=1, max_dreams=1)
    return dict(source=SOURCE, source_options=options, **shape)


def packed(rows: int, kinds: dict, **changes) -> dict:
    """Documents packed into rows."""
    shape = dict(batch_size=rows, length=128, max_images=9, max_dreams=9)
    return dict(source=SOURCE, source_options=dict(kinds=kinds), **shape) | changes


def stage0() -> list[dict]:
    """What the real system downloads."""
    text_only = packed(8, dict(text=1.0), max_images=0, max_dreams=0)
    return [
        stage("stage0_vae", ("vae",), 250, 2e-3, captions(64), objective="vae", loss=dict(kl_weight=1e-4)),
        stage(
            "stage0_clip",
            ("vision", "text", "contrastive"),
            400,
            1e-3,
            captions(128),
            objective="contrastive",
        ),
        stage(
            "stage0_unet",
            ("unet",),
            450,
            2e-3,
            captions(64, caption_dropout=0.1),
            objective="diffusion",
            optim=dict(ema_decay=0.995),
        ),
        stage(
            "stage0_language",
            ("llama",),
            1800,
            2e-3,
            text_only,
            loss=dict(weight_lm=1.0, weight_vm=0.0),
            optim=DECAY,
        ),
    ]


def dream_stages() -> list[dict]:
    """DreamLLM's own three stages."""
    drawing = ("dream_queries", "condition_projector")
    everything = ("llama", "vision_projector", *drawing)
    guided = dict(condition_dropout=0.1, timestep_sampling="cubic")
    joint = dict(weight_lm=1.0, weight_vm=10.0, **guided)
    return [
        stage(
            "stage1_comprehension",
            ("vision_projector",),
            500,
            3e-3,
            packed(
                16,
                dict(pairs=0.4, conversations=0.4, documents=0.2),
                mode="comprehension",
                max_images=16,
                max_dreams=0,
            ),
            loss=dict(weight_lm=1.0, weight_vm=0.0),
        ),
        stage(
            "stage1_creation",
            drawing,
            300,
            2e-3,
            packed(8, dict(documents=0.7, pairs=0.3)),
            loss=dict(weight_lm=0.0, weight_vm=1.0, **guided),
        ),
        stage(
            "stage2",
            everything,
            450,
            1e-4,
            packed(8, dict(documents=0.45, pairs=0.15, conversations=0.1, text=0.3)),
            loss=joint,
            optim=DECAY,
        ),
        stage(
            "stage3",
            everything,
            200,
            5e-5,
            packed(8, dict(documents=0.3, pairs=0.05, conversations=0.45, text=0.2)),
            loss=joint,
            optim=DECAY,
        ),
    ]


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; with arg "tiny", a few steps of each stage (to try the machinery, not to learn)."""
    if arg not in (None, "tiny"):
        raise ValueError(f"examples/handwriting/config.py has no variant {arg!r}; leave it out, or say tiny.")
    stages = [*stage0(), *dream_stages()]
    if arg == "tiny":
        stages = [s | dict(steps=4) for s in stages]
    recipe = dict(
        name="handwriting",
        model=model(),
        stages=stages,
        tokenizer=dict(corpus="examples.handwriting.words:corpus_text", vocab_size=VOCABULARY),
        generation=dict(
            max_new_tokens=32,
            max_images=7,
            num_inference_steps=12,
            guidance_scale=3.0,
            sampler="dpmpp_2m",
        ),
        mesh=dict(data=1, fsdp=-1),
        frozen_dtype="float32",
        checkpoint_every=200,
    )
    return ConfigDict(recipe)
