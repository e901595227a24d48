"""The conversion tables: data only, one row per parameter family.

`RULES[part]` maps the names inside a part (a tower or connector, as its Hugging Face class names them) to our
parameters. Which file and prefix a part has in a checkpoint is known to the adapters. Order matters: the
first matching row is used.
"""

from __future__ import annotations

from dreamllm_jax.convert.patterns import Rule

R = Rule

# Buffers that some releases save and that carry no information.
IGNORED_TENSORS = (
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?(position_ids|token_type_ids)",
    r"(.*\.)?num_batches_tracked",
)

LLAMA = (
    R("model.embed_tokens.weight", "llama/embed_tokens/embedding"),
    R(
        "model.layers.{layer}.{m:self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.o_proj}.weight",
        "llama/layers/{m}/kernel",
        "linear",
    ),
    R(
        "model.layers.{layer}.{m:self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.o_proj}.bias",
        "llama/layers/{m}/bias",
    ),
    R(
        "model.layers.{layer}.{m:mlp.gate_proj|mlp.up_proj|mlp.down_proj}.weight",
        "llama/layers/{m}/kernel",
        "linear",
    ),
    R("model.layers.{layer}.{m:input_layernorm|post_attention_layernorm}.weight", "llama/layers/{m}/scale"),
    R("model.norm.weight", "llama/norm/scale"),
    R("lm_head.weight", "llama/lm_head/kernel", "linear", harmless=True),
)


def _clip_encoder(tower: str) -> tuple[Rule, ...]:
    linear = "self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.out_proj|mlp.fc1|mlp.fc2"
    return (
        R(
            f"encoder.layers.{{layer}}.{{m:{linear}}}.weight",
            f"{tower}/encoder/layers/{{m}}/kernel",
            "linear",
        ),
        R(f"encoder.layers.{{layer}}.{{m:{linear}}}.bias", f"{tower}/encoder/layers/{{m}}/bias"),
        R("encoder.layers.{layer}.{m:layer_norm1|layer_norm2}.weight", f"{tower}/encoder/layers/{{m}}/scale"),
        R("encoder.layers.{layer}.{m:layer_norm1|layer_norm2}.bias", f"{tower}/encoder/layers/{{m}}/bias"),
    )


VISION = (
    R("embeddings.class_embedding", "vision/embeddings/class_embedding"),
    R("embeddings.patch_embedding.weight", "vision/embeddings/patch_embedding/kernel", "conv"),
    R("embeddings.position_embedding.weight", "vision/embeddings/position_embedding/embedding"),
    *_clip_encoder("vision"),
    R("{m:pre_layrnorm|post_layernorm}.weight", "vision/{m}/scale"),
    R("{m:pre_layrnorm|post_layernorm}.bias", "vision/{m}/bias"),
)

TEXT = (
    R("embeddings.{m:token_embedding|position_embedding}.weight", "text/embeddings/{m}/embedding"),
    *_clip_encoder("text"),
    R("final_layer_norm.weight", "text/final_layer_norm/scale"),
    R("final_layer_norm.bias", "text/final_layer_norm/bias"),
)

# CLIP's joint head, beside its two towers.
CONTRASTIVE = (
    R("{m:visual_projection|text_projection}.weight", "contrastive/{m}/kernel", "linear"),
    R("logit_scale", "contrastive/logit_scale"),
)

DREAM_QUERIES = (
    R("dream_queries", "dream_queries/dream_queries", "unbatch", rank=3),
    R("dream_queries", "dream_queries/dream_queries", rank=2),
)


def _projector(name: str) -> tuple[Rule, ...]:
    """Returns the rules of a reference projector: SAM's, conv, mlp (linear maps and GELU), or linear."""
    sam, mlp = f"{name}/conv_1/kernel", f"{name}/linear_1/kernel"
    depth = range(8)
    return (
        R("projector.0.weight", f"{name}/conv_0/kernel", "conv", given=sam),
        R("projector.1.weight", f"{name}/conv_1/kernel", "conv", given=sam),
        R("mlp.weight", f"{name}/linear_0/kernel", "linear", given=sam),
        R("projector.weight", f"{name}/conv_0/kernel", "conv", rank=4),
        R("projector.bias", f"{name}/conv_0/bias", given=f"{name}/conv_0/kernel"),
        *(R(f"projector.{2 * i}.weight", f"{name}/linear_{i}/kernel", "linear", given=mlp) for i in depth),
        *(R(f"projector.{2 * i}.bias", f"{name}/linear_{i}/bias", given=mlp) for i in depth),
        R("projector.weight", f"{name}/linear_0/kernel", "linear"),
        R("projector.bias", f"{name}/linear_0/bias"),
        # the Hugging Face port of LLaVA-1.5
        *(R(f"linear_{i + 1}.weight", f"{name}/linear_{i}/kernel", "linear", given=mlp) for i in range(2)),
        *(R(f"linear_{i + 1}.bias", f"{name}/linear_{i}/bias", given=mlp) for i in range(2)),
        # legacy: the linear map's own state dict
        R("weight", f"{name}/linear_0/kernel", "linear"),
        R("bias", f"{name}/linear_0/bias"),
    )


_CONVS = "**conv_in|conv_out|conv1|conv2|conv_shortcut|conv|quant_conv|post_quant_conv"
_NORMS = "**norm|norm1|norm2|norm3|group_norm|conv_norm_out"
_UNET_LINEAR = "**to_q|to_k|to_v|to_out.0|net.0.proj|net.2|time_emb_proj|linear_1|linear_2"

UNET = (
    R(
        f"{{at}}.transformer_blocks.{{layer}}.{{m:{_UNET_LINEAR}}}.weight",
        "unet/{at}/transformer_blocks/{m}/kernel",
        "linear",
    ),
    R(
        f"{{at}}.transformer_blocks.{{layer}}.{{m:{_UNET_LINEAR}}}.bias",
        "unet/{at}/transformer_blocks/{m}/bias",
    ),
    R(
        "{at}.transformer_blocks.{layer}.{m:norm1|norm2|norm3}.weight",
        "unet/{at}/transformer_blocks/{m}/scale",
    ),
    R(
        "{at}.transformer_blocks.{layer}.{m:norm1|norm2|norm3}.bias",
        "unet/{at}/transformer_blocks/{m}/bias",
    ),
    R("{m:**proj_in|proj_out}.weight", "unet/{m}/kernel", "conv", rank=4),
    R("{m:**proj_in|proj_out}.weight", "unet/{m}/kernel", "linear", rank=2),
    R(f"{{m:{_CONVS}}}.weight", "unet/{m}/kernel", "conv"),
    R(f"{{m:{_UNET_LINEAR}}}.weight", "unet/{m}/kernel", "linear"),
    R(f"{{m:{_NORMS}}}.weight", "unet/{m}/scale"),
    R(f"{{m:{_NORMS}}}.bias", "unet/{m}/bias"),
    R(f"{{m:{_CONVS}|proj_in|proj_out|{_UNET_LINEAR.removeprefix('**')}}}.bias", "unet/{m}/bias"),
)

_VAE_LINEAR = "**to_q|to_k|to_v|to_out.0"
VAE = (
    R(f"{{m:{_CONVS}}}.weight", "vae/{m}/kernel", "conv"),
    R(f"{{m:{_VAE_LINEAR}}}.weight", "vae/{m}/kernel", "linear", rank=2),
    R(f"{{m:{_VAE_LINEAR}}}.weight", "vae/{m}/kernel", "conv_as_linear", rank=4),
    R(f"{{m:{_NORMS}}}.weight", "vae/{m}/scale"),
    R(f"{{m:{_NORMS}}}.bias", "vae/{m}/bias"),
    R(f"{{m:{_CONVS}|{_VAE_LINEAR.removeprefix('**')}}}.bias", "vae/{m}/bias"),
    # files from before diffusers 0.18
    *(
        R(f"{{at}}.attentions.0.{old}.weight", f"vae/{{at}}/attentions_0/{new}/kernel", transform, rank=rank)
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out_0"))
        for transform, rank in (("linear", 2), ("conv_as_linear", 4))
    ),
    *(
        R(f"{{at}}.attentions.0.{old}.bias", f"vae/{{at}}/attentions_0/{new}/bias")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out_0"))
    ),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "llama": LLAMA,
    "vision": VISION,
    "text": TEXT,
    "contrastive": CONTRASTIVE,
    "dream_queries": DREAM_QUERIES,
    "vision_projector": _projector("vision_projector"),
    "condition_projector": _projector("condition_projector"),
    "global_projector": _projector("global_projector"),
    "unet": UNET,
    "vae": VAE,
}
