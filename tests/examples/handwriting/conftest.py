"""A finished work folder of a tiny random model, and a model that answers from the real pictures."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.checkpoint.model_folder import save_pretrained
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.towers import ClipTextConfig, ClipVisionConfig, LlamaConfig, UNetConfig, VaeConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.document import Document
from dreamllm_jax.generate.api import DreamLLM
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.run_folder import RunFolder
from examples.handwriting.cases import unseen_cases
from examples.handwriting.config import SOURCE
from examples.handwriting.digits import load_digits
from examples.handwriting.words import WORDS, corpus_text
from tests.folders import load_pretrained

SIZE = 16
CONFIG = DreamLLMConfig(
    llama=LlamaConfig(512, 16, 16, 1, 2),
    vision=ClipVisionConfig(16, 16, 1, 2, image_size=SIZE, patch_size=8, projection_dim=8),
    num_dream_queries=2,
    unet=UNetConfig(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
    ),
    vae=VaeConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=SIZE),
    text=ClipTextConfig(512, 8, 8, 1, 2, max_position_embeddings=8, projection_dim=8, eos_token_id=2),
    contrastive=True,
    image_size=SIZE,
)
DATA = DataConfig(source=SOURCE, source_options={"kinds": {"pairs": 1.0}})
RECIPE = Recipe(
    name="handwriting",
    model=CONFIG,
    stages=tuple(
        StageConfig(name=name, trainable=("llama",), steps=5, data=DATA) for name in ("first", "second")
    ),
)


class Oracle(DreamLLM):
    """Draws training pictures and gives the right answers, except to the first question."""

    @classmethod
    def from_pretrained(cls, path, quantize=None):
        """With the config, parameters and settings of a real folder."""
        loaded = load_pretrained(path)
        model = cls(loaded.config, loaded.params, loaded.tokenizer, loaded.generation)
        model.digits, model.held_out = load_digits(SIZE)
        model.drawn = 0
        return model

    def picture(self, digit):
        candidates = self.digits.images[self.digits.labels == digit]
        self.drawn += 1
        return Image.fromarray(candidates[self.drawn % len(candidates)])

    def generate_images(self, prompt, *, num_images_per_prompt=1, seed=0):
        digits = [WORDS.index(p.split()[-1]) for p in prompt]
        return [[self.picture(d) for _ in range(num_images_per_prompt)] for d in digits]

    def generate_text(self, prompt, *, max_new_tokens=None):
        assert len(prompt) == len(self.held_out)
        answers = [WORDS[label] for label in self.held_out.labels]
        return ["<nothing>", *answers[1:]]

    def generate_document(self, prompt, *, seed=0):
        def key(p):
            return p if isinstance(p, str) else p.images[0].tobytes()

        expected = {key(case.prompt): case.expected for case in unseen_cases(size=SIZE)}
        return [
            Document([q if isinstance(q, str) else self.picture(q) for q in expected[key(p)]], "stop")
            for p in prompt
        ]


@pytest.fixture(scope="session")
def oracle():
    return Oracle


@pytest.fixture(scope="session")
def recipe():
    return RECIPE


@pytest.fixture
def save_model():
    """Writes the tiny model with random weights into a folder."""

    def save(folder, seed=0):
        rng = np.random.default_rng(seed)
        params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in abstract_params(CONFIG).items()}
        tokenizer = train_tokenizer(corpus_text(), 512)
        save_pretrained(folder, params, CONFIG, tokenizer, GenerationConfig(max_new_tokens=7))

    return save


@pytest.fixture
def workdir(tmp_path, save_model):
    """As a finished training leaves it."""
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(RECIPE)))
    for i, stage in enumerate(RECIPE.stages):
        folder = RunFolder(tmp_path, RECIPE).stage(stage)
        folder.logs.mkdir(parents=True)
        records = [{"step": s, "loss_lm": 1 / s, "token_accuracy": 0.1 * s} for s in range(1, 6)]
        (folder.logs / "curves.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        done = {"seconds": 10.0 * (i + 1), "peak_rss_gib": 0.5 + i, "steps": 5, "data": {}}
        folder.done_file.write_text(json.dumps(done))
    save_model(RunFolder(tmp_path, RECIPE).stage(RECIPE.stages[-1]).model)
    return tmp_path


@pytest.fixture
def change_recipe(workdir):
    """Rewrites the work folder's recipe."""

    def change(**changes):
        (workdir / "recipe.json").write_text(json.dumps(to_dict(dataclasses.replace(RECIPE, **changes))))

    return change
