"""One image file to the uint8 square that a model reads, bit for bit as open_clip 3.3 prepares it for evaluation.

    shortest   shorter side to `image_size`, centre crop
    longest    longer side to `image_size`, black on both sides of the shorter one
    squash     both sides to `image_size`

As in open_clip: bicubic by PIL, resized in the image's own mode (grey, RGB, CMYK) and then turned to RGB, and the
orientation in EXIF is ignored, so that an exported model sees in open_clip what it saw here. Three kinds of image
differ on purpose: transparent ones lie on white (open_clip shows whatever colour transparent pixels happen to have),
palette and two-tone ones are interpolated (in their own mode PIL takes the nearest pixel), and 16-bit grey is scaled
(PIL turns nearly all of it white).

Only JPEG, PNG and WebP are opened, single frames of at most 64 megapixels: PIL knows some forty formats, one of which
starts ghostscript, and a few hundred bytes can ask for gigabytes.
"""

from io import BytesIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmcl.errors import DataError
from mmcl.types import InputSpec

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 10**6


def decode_image(data: bytes, spec: InputSpec) -> UInt8[Tensor, "3 h w"]:
    """The image in `data`, RGB, `h = w = spec.image_size`, 0..255.

    Raises:
        DataError: not a whole JPEG, PNG or WebP, animated, above 64 megapixels, or too narrow to be resized.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check(image)
            image.load()
            square = _resize(_opaque(image), spec)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text holds an address, which differs from run to run
        raise DataError("not a readable JPEG, PNG or WebP image: no such header") from error
    except Exception as error:  # PIL's plugins raise anything from SyntaxError to struct.error on hostile bytes
        raise DataError(f"not a readable JPEG, PNG or WebP image: {error or type(error).__name__}") from error
    return torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1).contiguous()


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"an image of {width}x{height} pixels is over the limit of {MAX_PIXELS}")
    # phones append a second picture (depth, gain map) to a JPEG, which PIL calls MPO: the photo is the first
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) != 1:
        raise DataError(f"an animation of {frames} frames, not an image")


def _opaque(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        top = image.convert("RGBA")
        white = Image.new("RGBA", top.size, "white")
        return Image.alpha_composite(white, top).convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _resize(image: Image.Image, spec: InputSpec) -> Image.Image:
    side, (width, height) = spec.image_size, image.size
    if spec.resize_mode == "squash":
        size = (side, side)
    elif spec.resize_mode == "shortest":
        size = _shortest(width, height, side)
    else:
        ratio = max(height / side, width / side)
        size = (round(width / ratio), round(height / ratio))
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"an image of {width}x{height} pixels is too narrow to be resized to {side} pixels")
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (_offset(length, side) for length in size)
    return resized.crop((left, top, left + side, top + side))  # PIL fills what lies outside with zeros


def _shortest(width: int, height: int, side: int) -> tuple[int, int]:
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _offset(length: int, side: int) -> int:
    # torchvision rounds a crop to even and a padding down
    return round((length - side) / 2) if length >= side else -((side - length) // 2)
