"""`dreamllm generate`: what goes where, and what is refused before a model is loaded."""

import re

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.checkpoint.model_folder import write_pretrained
from dreamllm_jax.commands.main import main
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.document import Document
from dreamllm_jax.generate.api import DreamLLM
from tests.train import tiny

WORDS = [f"{a}{b}{c}" for a in "bcdfghjkl" for b in "aeiou" for c in "mnprst"]
SETTINGS = GenerationConfig(max_new_tokens=8, max_images=1, num_inference_steps=2, sampler="ddim")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], tiny.VOCABULARY)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny model, saved, that begins an image more often than anything else."""
    params = tiny.random_params(tiny.config())
    params["llama/embed_tokens/embedding"][:, 0] = 4.0
    params["llama/lm_head/kernel"][0, tokenizer.special.dream_start] = 4.0
    path = tmp_path_factory.mktemp("generate") / "model"
    write_pretrained(path, params, tiny.config(), tokenizer, SETTINGS)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "seen.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    return path


def test_text_is_printed_and_may_be_kept(folder, tmp_path, capsys):
    expected = DreamLLM.from_pretrained(folder).generate_text(["bam", "cen"], temperature=1.0, seed=3)
    words = ["generate", str(folder), "bam", "cen", "--text", "--temperature=1.0", "--seed=3"]
    assert main(words) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    assert main([*words, f"--out={tmp_path / 'a.txt'}"]) == 0
    assert [(tmp_path / f"a-{i}.txt").read_text() for i in (0, 1)] == [f"{text}\n" for text in expected]
    assert f"wrote {tmp_path / 'a-1.txt'}" in capsys.readouterr().out


def test_pictures_and_documents_are_files(folder, picture, tmp_path, capsys):
    """An image is drawn by its prompt and the one shown before it; a document has its images inside."""
    model = DreamLLM.from_pretrained(folder)
    seen = Image.open(picture)
    (expected,) = model.generate_images(Document([seen, "bam"]), seed=1)
    out = tmp_path / "drawn.png"
    assert main(["generate", str(folder), "bam", f"--image={picture}", f"--out={out}", "--seed=1"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert main(["generate", str(folder), "bam", f"--out={out}", "--num-images-per-prompt=2"]) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"drawn-{i}.png")) for i in (0, 1))
    assert (first != second).any()

    page = tmp_path / "page.html"
    assert main(["generate", str(folder), "bam", f"--out={page}", "--seed=2"]) == 0
    assert len(re.findall(r'src="data:image/png;base64,', page.read_text())) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--document"], "--document needs --out, a file that ends in .html"),
        (["--images"], "--images needs --out, a file that ends in .png"),
        (["--images", "--out=a.html"], "--images is written as .png, but --out is a.html"),
        (["--out=a.gif"], "--out=a.gif: give a file that ends in .html, .png, .txt"),
        (["--out=nowhere/a.png"], "its folder does not exist"),
        (["--text", "--guidance-scale=3", "--eta=1"], "--eta, --guidance-scale has no effect on --text"),
        (["--image=none.png"], "--image=none.png: the file does not exist"),
        (["--image=text.txt"], "text.txt is not an image"),
        (["--mesh=fsdp"], "'fsdp' is not AXIS=N"),
        (["--mesh=sideways=2"], "unknown key 'sideways'"),
        ([], "nowhere does not exist"),
    ],
)
def test_wrong_requests_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no image")
    assert main(["generate", "nowhere", "bam", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_setting_of_a_wrong_value_is_named(folder, capsys):
    assert main(["generate", str(folder), "bam", "--temperature=-1"]) == 2
    assert "temperature is -1.0" in capsys.readouterr().err
