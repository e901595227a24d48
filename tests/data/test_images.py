"""Images to arrays: geometry, colour, and what is broken."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from transformers import CLIPImageProcessorPil

from dreamllm_jax.data.images import to_diffusion, to_rgb, to_vision
from dreamllm_jax.models.clip import normalize_pixels


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


PHOTOGRAPHS = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
# Cut from the photographs (width, height): larger, smaller and odd, narrow, and just as large as wanted.
SIZES = ((640, 427), (427, 301), (97, 427), (640, 61), (224, 224), (225, 331), (37, 50))


def shapes_of(photograph):
    """The photograph in the forms in which users bring one."""
    image = Image.fromarray(photograph)
    for width, height in SIZES:
        yield f"{width}x{height}", image.crop((0, 0, width, height))
    ramp_of_alpha = Image.fromarray(np.tile(np.linspace(0, 255, 640), (427, 1)).astype(np.uint8))
    clear = image.convert("RGBA")
    clear.putalpha(ramp_of_alpha)
    gray = image.convert("L")
    yield from {"alpha": clear, "gray": gray, "gray, alpha": Image.merge("LA", (gray, ramp_of_alpha))}.items()
    palette = image.convert("P")
    palette.info["transparency"] = max(palette.getcolors())[1]  # its commonest colour
    yield from {"palette": image.convert("P"), "clear colour": palette, "CMYK": image.convert("CMYK")}.items()
    for orientation in range(1, 9):
        exif, buffer = image.getexif(), io.BytesIO()
        exif[0x0112] = orientation
        image.crop((0, 0, 333, 200)).save(buffer, format="JPEG", exif=exif)
        yield f"orientation {orientation}", Image.open(buffer)


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_as_transformers_sees_them(name, size):
    """Bit for bit as its loader and CLIP's processor give them, and normalized as it does."""
    from transformers.image_utils import load_image

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    bare = {"do_rescale": False, "do_normalize": False}
    seen = set()
    for form, image in shapes_of(PHOTOGRAPHS[name]):
        turned = ImageOps.exif_transpose(image)  # its loader does it, before it would lose transparency
        theirs = processor(turned, return_tensors="np", **bare).pixel_values[0].transpose(1, 2, 0)
        ours = to_vision(image, size)
        np.testing.assert_array_equal(ours, theirs, err_msg=form)
        seen.add(ours.tobytes())
        if form.startswith("orientation"):
            np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(to_rgb(image)), form)
    assert len(seen) >= len(SIZES) + 12  # CMYK gives the first form again
    theirs = processor(turned, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(normalize_pixels(jnp.asarray(ours)), theirs, atol=2e-6)


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
    with pytest.raises(ValueError, match="Cannot read .*it has no pixels. A complete, undamaged image"):
        to_rgb(Image.new("RGB", (0, 5)))
