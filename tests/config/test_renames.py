"""Files that version 0.1 saved still load; recipes must use today's names."""

import dataclasses

import pytest

from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.data import DataConfig, SourceConfig
from dreamllm_jax.config.registry import resolve
from dreamllm_jax.config.renames import RENAMED, translate
from dreamllm_jax.config.train import MeshConfig, OptimConfig, TokenizerConfig, build_recipe

CLASSES = {cls.__name__: cls for cls in (DataConfig, SourceConfig, MeshConfig, OptimConfig)}
OLD = {
    "name": "old",
    "model": {
        "llama": {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    },
    "stages": [
        {
            "name": "one",
            "trainable": ["llama"],
            "steps": 1,
            "data": {"rows": 12},
            "optim": {"accumulation": 3, "second_moment": "factored"},
        }
    ],
    "mesh": {"whole": ["vision"]},
}


def test_a_saved_recipe_of_0_1_loads():
    built = build_recipe(OLD, saved=True)
    assert built.stages[0].data.batch_size == 12
    assert built.stages[0].optim == OptimConfig(optimizer="adafactor", grad_accum_steps=3)
    assert built.mesh == MeshConfig(replicated=("vision",))


def test_an_old_key_in_a_recipe_is_named_with_the_new_one():
    with pytest.raises(
        ValueError, match=r"stages\[0\].data: key 'rows' is now called 'batch_size'; rename it"
    ):
        build_recipe(OLD)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {
                "source": "handwriting",
                "kinds": {"captions": 1.0, "pairs": 0.0},
                "sources": [],
                "augment": True,
                "caption_dropout": 0.1,
            },
            {
                "source": "examples.handwriting.source:Handwriting",
                "source_options": {
                    "kinds": {"captions": 1.0, "pairs": 0.0},
                    "augment": True,
                    "caption_dropout": 0.1,
                },
            },
        ),
        # 0.1 wrote every key of every source; those that mean nothing to its kind are left out.
        (
            {
                "source": None,
                "kinds": {"captions": 0.0},
                "augment": True,
                "caption_dropout": 0.0,
                "sources": [
                    {"images": None, "caption_key": "c", "min_similarity": None, "template": "plain"}
                    | {"kind": "pairs", "path": "a.tar", "weight": 2.0},
                    {"images": "i", "caption_key": None, "min_similarity": 0.3, "template": "plain"}
                    | {"kind": "interleaved", "path": "b", "weight": 1.0},
                    {"images": "i", "caption_key": None, "min_similarity": 0.3, "template": "plain"}
                    | {"kind": "instructions", "path": "c", "weight": 1.0},
                    {"images": None, "caption_key": None, "min_similarity": None, "template": "plain"}
                    | {"kind": "conversations", "path": "d", "weight": 1.0},
                ],
            },
            {
                "sources": [
                    {"format": "pairs", "path": "a.tar", "weight": 2.0, "options": {"caption_key": "c"}},
                    {"format": "interleaved", "path": "b", "options": {"images": "i", "min_similarity": 0.3}},
                    {
                        "format": "instructions",
                        "path": "c",
                        "options": {"images": "i", "min_similarity": 0.3, "template": "plain"},
                    },
                    {
                        "format": "conversations",
                        "path": "d",
                        "options": {"images": None, "template": "plain"},
                    },
                ]
            },
        ),
    ],
)
def test_saved_sources_of_0_1_load(data, expected):
    assert build(DataConfig, data, saved=True) == build(DataConfig, expected)
    with pytest.raises(ValueError, match="key 'kinds' is now called 'source_options.kinds'; rename it"):
        build(DataConfig, data)


def test_a_saved_corpus_of_0_1_can_be_imported():
    built = build(TokenizerConfig, {"path": None, "corpus": "handwriting", "vocab_size": 512}, saved=True)
    assert "Write two plus three. two plus three equals five" in resolve("corpus", built.corpus)()
    (stage,) = build_recipe(OLD | {"tokenizer": {"corpus": "handwriting"}}, saved=True).stages
    assert stage.data.source is None


def test_what_is_saved_today_is_left_alone():
    data = to_dict(build(DataConfig, {"source": "a.b:C", "source_options": {"kinds": {"pairs": 1.0}}}))
    assert translate("DataConfig", data) == data


@pytest.mark.parametrize(("cls", "old"), [(cls, old) for cls, table in RENAMED.items() for old in table])
def test_every_new_name_is_a_key_of_today(cls, old):
    fields = {field.name for field in dataclasses.fields(CLASSES[cls])}
    assert RENAMED[cls][old].key.split(".")[0] in fields and old not in fields


def test_adam_stays_adam():
    assert translate("OptimConfig", {"second_moment": "full"}) == {"optimizer": "adamw"}


def test_new_names_are_not_old_ones():
    for table in RENAMED.values():
        assert not table.keys() & {new.key for new in table.values()}
