"""The picture of documents: every image is on it, in its own pixels, in reading order."""

import io

import numpy as np
from PIL import Image

from dreamllm_jax.document import Document
from examples.handwriting.picture import render


def plain(color):
    return Image.new("RGB", (4, 4), color)


def pixels(documents):
    return np.asarray(Image.open(io.BytesIO(render(documents))).convert("RGB"))


def where(page, color):
    """(first column, last row) of the page's pixels of this color."""
    rows, columns = np.nonzero((page == color).all(axis=-1))
    return columns.min(), rows.max()


def test_images_stand_in_reading_order():
    first = Document(["red", plain((255, 0, 0)), "green", plain((0, 255, 0))])
    page = pixels({"Two colors.": first, "One color.": Document([plain((0, 0, 255))])})
    red, green, blue = (where(page, c) for c in [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    assert red[0] < green[0] and red[1] == green[1]  # side by side
    assert blue[1] > red[1] and blue[0] < red[0]  # on its own line, at its start
    assert (page[0] == 255).all() and (page[:, -1] == 255).all()  # nothing is cut off


def test_text_is_drawn():
    without, with_prompt = (pixels({prompt: Document(["word"])}) for prompt in (" ", "A prompt."))
    assert (with_prompt < 200).sum() > (without < 200).sum() > 0
