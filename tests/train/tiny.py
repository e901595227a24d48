"""A DreamLLM with every tower, as small as eight devices along any mesh axis allow, and rows for it."""

import functools
from pathlib import Path

import jax
import numpy as np

from dreamllm_jax.config.base import build
from dreamllm_jax.config.model import DreamLLMConfig, model_config
from dreamllm_jax.config.train import MeshConfig, Recipe, StageConfig
from dreamllm_jax.data.packing import RowLayout, assemble_batch
from dreamllm_jax.data.pieces import interleaved
from dreamllm_jax.data.sequences import EncodedDocument, encode_pieces
from dreamllm_jax.data.tokenizer import SpecialTokens, Tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat, abstract_params
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.run_folder import StageFolder
from dreamllm_jax.train.stage_context import StageContext

VOCABULARY = 408
# Recipes of the tests train on the documents and the text of the demonstration.
SOURCE = "examples.handwriting.source:Handwriting"
CORPUS = "examples.handwriting.words:corpus_text"
ROWS = 8
P, Q = 4, 4

MODEL = dict(
    llama=dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=128,
    ),
    vision=dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    ),
    num_dream_queries=Q,
    unet=dict(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    ),
    vae=dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8),
    schedule=dict(prediction_type="v_prediction"),
    image_size=8,
)

SDXL_CONDITIONS = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=16 + 6 * 8,
)

# Every option of the joint loss is on; chunks of 11 do not divide the rows.
LOSS = dict(
    weight_lm=1.0,
    weight_vm=10.0,
    scale="l1",
    snr_gamma=5.0,
    noise_offset=0.1,
    input_perturbation=0.1,
    condition_dropout=0.5,
    logits_chunk=11,
)

SPECIAL = SpecialTokens(
    bos=1,
    eos=2,
    unk=0,
    pad=3,
    im_start=4,
    im_end=5,
    im_patch=6,
    dream_start=7,
    dream_end=8,
    image=9,
    dream=10,
)

LAYOUT = RowLayout(
    length=64,
    num_patches=P,
    num_queries=Q,
    max_images=4,
    max_dreams=4,
    image_size=16,
    dream_size=8,
    null_dream=True,
)


class Letters(Tokenizer):
    """A tokenizer of one token per letter."""

    def __init__(self):
        self.special = SPECIAL

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return [100 + ord(letter) for letter in text]


def config(**changes) -> DreamLLMConfig:
    return model_config({**MODEL, **changes})


@functools.cache
def model() -> DreamLLMModule:
    return DreamLLMModule(config())


def stage(loss=None, **changes) -> StageConfig:
    """The joint stage in which everything is trained."""
    base = dict(name="joint", trainable=(".*",), steps=10, data={}, loss={**LOSS, **(loss or {})})
    return build(StageConfig, {**base, **changes})


def stage_context(folder: Path) -> StageContext:
    """The context of the tiny model's joint stage on one device."""
    recipe = Recipe(name="tiny", model=config(), stages=(stage(),))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return StageContext(
        recipe, recipe.stages[0], config(), Letters(), mesh, StageFolder(folder), folder / "index"
    )


def random_params(config: DreamLLMConfig, seed: int = 0) -> Flat:
    """Parameters in which every bias and every norm counts; nothing is compiled for them."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.normal(size=like.shape)
        if path.endswith("/kernel"):
            kernel = like.shape[1:] if "/layers/" in path or "transformer_blocks" in path else like.shape
            noise *= np.prod(kernel[:-1]) ** -0.5
        elif path.endswith("/scale"):
            noise = 1 + 0.2 * noise
        elif path.endswith("/bias"):
            noise *= 0.2
        return noise.astype(np.float32)

    return {path: leaf(path, like) for path, like in abstract_params(config).items()}


def documents(number: int, seed: int = 0) -> list[EncodedDocument]:
    """Short documents, of which about half have an image that is dreamed, seen or both."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        parts = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 5)))]
        if i % 3:
            parts.append(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8))
        if i % 4 == 2:
            parts.append("z")
        mode = ("joint", "creation", "comprehension")[rng.integers(3)]
        pieces = interleaved(parts, mode)
        made.append(encode_pieces(pieces, Letters(), P, Q, LAYOUT.room, max_images=4, max_dreams=3))
    return made


def rows_of(made: list[EncodedDocument], per_row: int = 3) -> list[list[EncodedDocument]]:
    """Rows of up to `per_row` documents; the first row has one less, for more padding."""
    rows = [made[: per_row - 1]]
    rows += [made[i : i + per_row] for i in range(per_row - 1, len(made), per_row)]
    return rows + [[]] * (ROWS - len(rows))


def packed(rows: list[list[EncodedDocument]]):
    """Their batch."""
    assert len(rows) == ROWS
    return assemble_batch(rows, LAYOUT, SPECIAL)
