"""`dreamllm train`: recipes by file and variant, and one sentence for a wrong request."""

from pathlib import Path

import pytest

from dreamllm_jax.commands.main import main
from dreamllm_jax.config.recipe_files import load_recipe

HANDWRITING = str(Path(__file__).resolve().parents[2] / "examples" / "handwriting" / "config.py")


@pytest.fixture
def complaint(capsys):
    """What the command prints about a wrong request: one sentence, with exit code 2."""

    def run(*arguments) -> str:
        assert main(["train", *map(str, arguments)]) == 2
        sentence = capsys.readouterr().err.strip()
        assert sentence.startswith("error: ") and "\n" not in sentence
        return sentence

    return run


def test_a_recipe_and_its_variant():
    whole, tiny = load_recipe(HANDWRITING), load_recipe(f"{HANDWRITING}:tiny")
    assert [s.name for s in whole.stages] == [s.name for s in tiny.stages]
    assert {s.steps for s in tiny.stages} == {4} and min(s.steps for s in whole.stages) > 100


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="the file does not exist; give a recipe"):
        load_recipe(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="has no function get_config"):
        load_recipe(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="has no variant 'huge'"):
        load_recipe(f"{HANDWRITING}:huge")


def test_the_command_ends_in_a_sentence(complaint, tmp_path):
    message = complaint("--config=nowhere.py", f"--workdir={tmp_path / 'a'}")
    assert message.startswith("error: --config=nowhere.py: the file does not exist")
    message = complaint(f"--config={HANDWRITING}", f"--workdir={tmp_path / 'a'}", "--until=stage9")
    assert "has no stage 'stage9'" in message
    (tmp_path / "file").write_text("")
    message = complaint(f"--config={HANDWRITING}", f"--workdir={tmp_path / 'file'}")
    assert "is a file; give a folder" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mesh.data=1.5", "mesh.data: got 1.5 (float); expected int"),
        ("model.image_size=foo", "model.image_size: got 'foo' (str); expected int"),
        ("name=3", "name: got 3 (int); expected str"),
        ("model=x", "model: got 'x'; expected a mapping"),
        ("seed=-1", "seed is -1; it must lie between 0 and 4294967295"),
        ("checkpoint_every=0", "checkpoint_every is 0; it must be at least 1"),
        ("log_every=0", "log_every is 0; it must be at least 1"),
        ("stages=[]", "recipe 'handwriting' has no stages"),
        ("model.num_dream_queries=0", "num_dream_queries is 0; it must be at least 1"),
        ("model.llama.vocab_size=0", "vocab_size is 0; it must be at least 1"),
        ("model.unet.block_out_channels=(0,64)", "block_out_channels is (0, 64); it must be at least 1"),
        ("stages.stage2.trainable=[]", "stage 'stage2': trainable is empty"),
        ("stages.stage1_creation.data.max_dreams=0", "stage 'stage1_creation': nothing is learned"),
        ("stages.stage0_vae.data.max_dreams=0", "stage 'stage0_vae': objective 'vae' needs images"),
        ("generation.template=foo", "generation: Unknown conversation template 'foo'"),
        ("generation.num_inference_steps=5000", "generation: num_steps is 5000"),
        ("generation.eta=0.5", "generation: eta is 0.5"),
    ],
)
def test_impossible_overrides_are_named_before_anything_happens(complaint, tmp_path, override, words):
    assert words in complaint(
        f"--config={HANDWRITING}", f"--workdir={tmp_path / 'a'}", f"--config.{override}"
    )
    assert not (tmp_path / "a").exists()
