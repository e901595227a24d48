"""Images from files and PIL to uint8 arrays, in the geometry that each tower was trained on.

Normalization happens on the device: uint8 travels there.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

ImageLike = Image.Image | np.ndarray | bytes | str | Path


def to_vision(image: ImageLike, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns an image in CLIP's geometry: shortest edge resized to `size` (bicubic), centre crop.

    Raises:
      ValueError: the image cannot be read; the message names it.
    """
    if _is_ready(image, size):
        return image  # type: ignore[return-value]
    return _resize_and_crop(to_rgb(image), size, Image.Resampling.BICUBIC)[0]


def to_diffusion(
    image: ImageLike, size: int
) -> tuple[UInt8[np.ndarray, "size size 3"], Int[np.ndarray, "6"]]:
    """Returns an image in the decoder's geometry: shortest edge resized to `size` (bilinear), centre crop.

    Returns:
      The image, and SDXL's size conditions of it in pixels: original height and width (before
      resizing), top and left of the crop (after resizing), target height and width.

    Raises:
      ValueError: the image cannot be read; the message names it.
    """
    if _is_ready(image, size):
        return image, np.array([size, size, 0, 0, size, size], np.int32)  # type: ignore[return-value]
    rgb = to_rgb(image)
    array, top, left = _resize_and_crop(rgb, size, Image.Resampling.BILINEAR)
    return array, np.array([rgb.height, rgb.width, top, left, size, size], np.int32)


def to_rgb(image: ImageLike) -> Image.Image:
    """Opens an image and converts it to RGB, with EXIF orientation applied, on white if it is transparent.

    Raises:
      ValueError: the image cannot be read; the message names it.
    """
    name = _name(image)
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | Path):
            image = Image.open(image)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise errors of many types
        raise ValueError(f"Cannot read {name}: {error}. A complete, undamaged image is needed.") from error


def _name(image: ImageLike) -> str:
    if isinstance(image, str | Path):
        return f"image {str(image)!r}"
    if isinstance(image, bytes):
        return f"image of {len(image)} bytes"
    if isinstance(image, np.ndarray):
        return f"image array of shape {image.shape} and type {image.dtype}"
    filename = getattr(image, "filename", "")
    return f"image {str(filename)!r}" if filename else f"image {image!r}"


def _is_ready(image: ImageLike, size: int) -> bool:
    return isinstance(image, np.ndarray) and image.shape == (size, size, 3) and image.dtype == np.uint8


def _resize_and_crop(rgb: Image.Image, size: int, resample: int) -> tuple[np.ndarray, int, int]:
    short, long = sorted(rgb.size)
    long = int(size * long / short)
    width, height = (size, long) if rgb.width <= rgb.height else (long, size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), resample)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size))), top, left
