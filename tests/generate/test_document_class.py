"""`Document`: strings and images in order, as a prompt and as a result."""

import base64
import io
import re

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import dreamllm_jax
from dreamllm_jax.document import Document, image_html


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)) for _ in range(2)]


def test_parts_in_order(images):
    document = Document(["two ", images[0], "", "plus", images[1]])
    assert list(document) == ["two ", images[0], "", "plus", images[1]]
    assert len(document) == 5 and document[1] is images[0] and document[-1] is images[1]
    assert document.text == "two plus"
    assert document.images == images
    assert document.finish_reason is None
    assert "<image 6x4>" in repr(document) and "'plus'" in repr(document)
    assert document == Document(list(document)) and document != Document(["two"])
    assert list(document + Document("end"))[-1] == "end"


def test_one_part_needs_no_list(images):
    assert list(Document("seven")) == ["seven"]
    assert list(Document(images[0])) == [images[0]]
    assert not Document().parts


def test_other_parts_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no runtime type checks
    with pytest.raises(ValueError, match="Part 1 of the document is a int; a document holds strings"):
        Document(["a", 3])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F", "1", "RGBA"])
def test_pictures_of_every_kind_are_shown(images, mode):
    page = Document([images[0].convert(mode)]).to_html()
    data = re.search(r"base64,([^\"]+)", page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == images[0].size


def test_html_shows_text_as_text_and_carries_the_pictures(images, tmp_path):
    document = Document(["<b> & co\n  next line", images[0]])
    document.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert document._repr_html_() in page
    assert '<span style="white-space:pre-wrap">&lt;b&gt; &amp; co\n  next line</span>' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    data = re.search(r"base64,([^\"]+)", page)[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(images[0]))
    assert 'width="96" height="64"' in page  # small images are enlarged
    assert 'width="6"' in image_html(images[0])


def test_the_front_door():
    assert dreamllm_jax.Document is Document
    assert dreamllm_jax.DreamLLM.__name__ == "DreamLLM"
    with pytest.raises(AttributeError, match="Dreams"):
        _ = dreamllm_jax.Dreams
