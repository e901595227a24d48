"""Pictures to arrays: geometry, colour, and what is broken."""

import io

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.data.images import to_diffusion, to_rgb, to_vision


def ramp(width, height):
    x = np.linspace(0, 255, width)[None, :, None]
    y = np.linspace(0, 255, height)[:, None, None]
    return Image.fromarray(np.concatenate([x + 0 * y, y + 0 * x, 0 * x + 0 * y], 2).astype(np.uint8))


def test_vision_geometry_is_shortest_edge_then_centre():
    image = ramp(60, 30)
    expected = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))[:, 8:24]
    np.testing.assert_array_equal(to_vision(image, 16), expected)
    tall = to_vision(ramp(30, 47), 16)
    assert tall.shape == (16, 16, 3) and tall.dtype == np.uint8


def test_vision_as_transformers_does():
    transformers = pytest.importorskip("transformers")
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else None
    if name is None:
        pytest.skip("this transformers has no PIL image processor")
    processor = getattr(transformers, name)(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        do_rescale=False,
        do_normalize=False,
    )
    for size in ((60, 41), (41, 60), (28, 28), (29, 97)):
        theirs = processor(ramp(*size), return_tensors="np").pixel_values[0]
        np.testing.assert_array_equal(to_vision(ramp(*size), 28), theirs.transpose(1, 2, 0))


def test_diffusion_sizes():
    array, sizes = to_diffusion(ramp(80, 40), 16)
    assert array.shape == (16, 16, 3)
    assert sizes.tolist() == [40, 80, 0, 8, 16, 16]
    assert to_diffusion(ramp(20, 50), 16)[1].tolist() == [50, 20, 12, 0, 16, 16]
    assert to_diffusion(np.zeros((16, 16, 3), np.uint8), 16)[1].tolist() == [16, 16, 0, 0, 16, 16]


def test_an_array_of_the_right_size_passes_through():
    array = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert to_vision(array, 16) is array and to_diffusion(array, 16)[0] is array


def test_colour_modes():
    gray = Image.fromarray(np.full((4, 4), 100, np.uint8))
    assert np.asarray(to_rgb(gray))[0, 0].tolist() == [100, 100, 100]
    deep = Image.fromarray(np.full((4, 4), 100 * 256, np.uint16))
    assert np.asarray(to_rgb(deep))[0, 0].tolist() == [100, 100, 100]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(to_rgb(clear))[0, 0].tolist() == [255, 255, 255]
    half = Image.new("LA", (4, 4), (0, 128))
    assert abs(int(np.asarray(to_rgb(half))[0, 0, 0]) - 127) <= 1
    palette = Image.new("RGB", (4, 4), "blue").convert("P")
    assert np.asarray(to_rgb(palette))[0, 0].tolist() == [0, 0, 255]


def test_exif_orientation():
    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert to_rgb(buffer.getvalue()).size == (4, 6)


def test_broken_images_are_named(tmp_path):
    buffer = io.BytesIO()
    ramp(64, 64).save(buffer, format="PNG")
    path = tmp_path / "torn.png"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    for broken in (path, str(path), Image.open(path)):
        with pytest.raises(ValueError, match="Cannot read image '.*torn.png'"):
            to_vision(broken, 16)
    with pytest.raises(ValueError, match="Cannot read image of 3 bytes"):
        to_diffusion(b"abc", 16)
    with pytest.raises(ValueError, match="Cannot read image '.*nowhere.png'"):
        to_rgb(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"array of shape \(2, 3\)"):
        to_rgb(np.zeros((2, 3), np.complex64))


def test_a_picture_without_pixels():
    with pytest.raises(ValueError, match="Cannot read .*it has no pixels. A whole, unbroken picture"):
        to_rgb(Image.new("RGB", (0, 5)))
