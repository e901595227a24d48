"""A format and a source from outside the package: by `module:Class`, and by the entry point of a package."""

import sys

import pytest

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipVisionConfig
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.data.sources import check_source, open_documents
from tests.data.fakes import WordTokenizer

# The format of `formats.base`'s docstring and the source of `sources`', as a user would write them.
MODULE = """
import dataclasses

import numpy as np

from dreamllm_jax.data.formats.base import Format
from dreamllm_jax.data.pieces import interleaved, pair


@dataclasses.dataclass(frozen=True)
class LinesOptions:
    prefix: str = ""


class Lines(Format):
    Options = LinesOptions

    def __init__(self, paths, options, context):
        self.lines = [line for path in paths for line in path.read_text().splitlines()]
        self.options, self.mode = options, context.mode

    def __len__(self):
        return len(self.lines)

    def document(self, number, rng):
        return interleaved([self.options.prefix + self.lines[number]], self.mode)


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    caption: str = "noise"


class Noise:
    Options = NoiseOptions

    def __init__(self, options, context):
        self.options, self.size = options, context.picture_size

    def document(self, rng, index):
        image = rng.integers(0, 256, (self.size, self.size, 3), np.uint8)
        return pair(image, self.options.caption, "comprehension")
"""
MODEL = DreamLLMConfig(vision=ClipVisionConfig(image_size=16, patch_size=8))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder: a module that Python finds, and a file in the user's own format."""
    (tmp_path / "my_formats.py").write_text(MODULE)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_formats", None)


def register(folder):
    """What an installer leaves of a package that registers the format as `lines`."""
    info = folder / "my_formats-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-formats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dreamllm_jax.formats]\nlines = my_formats:Lines\n")


def data(folder, kind, **options):
    source = {"format": kind, "path": f"{folder}/*.txt", "options": options}
    return build(DataConfig, {"sources": [source], "batch_size": 1, "length": 32, "prefetch": 0})


def tokens(config, model=MODEL):
    tokenizer = WordTokenizer()
    check_source(config, tokenizer)
    batch = next(batches(config, model, tokenizer, seed=0))
    words = {number: word for word, number in tokenizer.words.items()}
    return [words[int(t)] for t in batch.tokens[0] if int(t) in words], batch


@pytest.mark.parametrize("kind", ["my_formats:Lines", "lines"])
def test_a_format_of_ones_own(project, kind):
    register(project)
    read, _ = tokens(data(project, kind, prefix="> "))
    assert read.count(">") >= 3 and set(read) == {">", "one", "two", "three"}


def test_its_options_are_checked(project):
    with pytest.raises(
        ValueError, match=r"\(my_formats:Lines\) options: unknown key 'prefx'. Did you mean 'p"
    ):
        check_source(data(project, "my_formats:Lines", prefx="> "), WordTokenizer())
    with pytest.raises(ValueError, match="Unknown format 'lines'; known: conv"):
        data(project, "lines")


def test_a_source_of_ones_own(project):
    config = DataConfig(
        source="my_formats:Noise",
        source_options={"caption": "grey"},
        batch_size=1,
        length=32,
        prefetch=0,
    )
    read, batch = tokens(config)
    assert set(read) == {"grey"} and batch.image_mask.any() and batch.images.std() > 50


def test_what_is_not_a_source_is_refused(project):
    for name in ("my_formats:np", "math:sqrt"):
        with pytest.raises(ValueError, match="is not a document source; name a class with a"):
            open_documents(DataConfig(source=name), 16, WordTokenizer())
