"""A tiny recipe of two stages: the VAE alone, then the connectors."""

import copy
import functools

from tests.train import tiny

CONNECTORS = ("vision_projector", "dream_queries", "condition_projector")
DECAY = 0.15
RECIPE = dict(
    name="tiny",
    model=tiny.MODEL,
    tokenizer=dict(corpus=tiny.CORPUS, vocab_size=tiny.VOCABULARY),
    frozen_dtype="float32",
    checkpoint_every=2,
    log_every=1,
    stages=[
        dict(
            name="vae",
            objective="vae",
            trainable=("vae",),
            steps=2,
            data=dict(
                source=tiny.SOURCE,
                source_options=dict(kinds=dict(captions=1.0)),
                batch_size=8,
                length=16,
                max_images=1,
                max_dreams=1,
            ),
            optim=dict(learning_rate=1e-2),
        ),
        dict(
            name="joint",
            trainable=CONNECTORS,
            steps=5,
            data=dict(
                source=tiny.SOURCE,
                source_options=dict(kinds=dict(pairs=1.0)),
                batch_size=8,
                length=64,
                max_images=2,
                max_dreams=3,
            ),
            loss=dict(condition_dropout=0.3),
            optim=dict(learning_rate=1e-2, ema_decay=DECAY, warmup_ratio=0.4),
        ),
    ],
)

STAGE = RECIPE["stages"][1]


def changed(*path_and_value):
    """Returns the recipe with one entry replaced: changed("stages", 1, "name", "other")."""
    *path, last, value = path_and_value
    mapping = copy.deepcopy(RECIPE)
    functools.reduce(lambda node, key: node[key], path, mapping)[last] = value
    return mapping


TEXT = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=16,
    projection_dim=32,
    eos_token_id=2,
)
