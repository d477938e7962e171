"""One image file to the uint8 square that a model reads.

With `pil`, bit for bit as open_clip 3.3 prepares it for evaluation:

    shortest   shorter side to `image_size`, centre crop
    longest    longer side to `image_size`, black on both sides of the shorter one
    squash     both sides to `image_size`

As in open_clip: bicubic by PIL, resized in the image's own mode (grey, RGB, CMYK) and then turned to RGB, and the
orientation in EXIF is ignored, so that an exported model sees in open_clip what it saw here. Three kinds of image
differ on purpose: transparent ones lie on white (open_clip shows whatever colour transparent pixels happen to have),
palette and two-tone ones are interpolated (in their own mode PIL takes the nearest pixel), and 16-bit grey is scaled
(PIL turns nearly all of it white).

With `native`, libjpeg and libpng by torchvision, and its resizing on bytes, for what those hold plainly: RGB and grey
pictures of 8 bits. The pixels are PIL's within a few thousandths on average, in a third of the time. All other kinds go
through PIL. With `draft`, PIL decodes a JPEG at the half, quarter or eighth of its size that is still large enough,
which is quicker where images are much larger than the model's, and a little less sharp.

Only JPEG, PNG and WebP are opened, single frames of at most 64 megapixels (24 where decoding takes several copies): PIL
knows some forty formats, one of which starts ghostscript, and a few hundred bytes can ask for gigabytes.
"""

from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmcl.errors import DataError
from mmcl.types import InputSpec
from mmcl_data.augment import Box

Decoder = Literal["native", "pil", "draft"]
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 10**6
MAX_COSTLY_PIXELS = 24 * 10**6
"""Of what takes several copies of the image to decode: WebP, progressive JPEG, CMYK, and whatever is transparent."""
MAX_SCANS = 64
"""Of a progressive JPEG, each of which goes over the whole image again; encoders write about ten."""


def decode_image(
    data: bytes, spec: InputSpec, *, decoder: Decoder = "pil", exif: str = "ignore", box: Box | None = None
) -> UInt8[Tensor, "3 h w"]:
    """The image in `data`, RGB, `h = w = spec.image_size`, 0..255.

    Args:
        data: a file.
        spec: what the model reads.
        decoder: `pil`, `native` or `draft`.
        exif: `apply` turns the image as its EXIF says.
        box: the part that is shown, stretched to the square; None is the whole, as `spec.resize_mode` says.

    Raises:
        DataError: not a whole JPEG, PNG or WebP, animated, above the limits of size, or too narrow to be resized.
    """
    try:
        size = _plain_jpeg(data) if decoder == "native" and exif == "ignore" else None
        if size and (square := _native(data, size, spec, box)) is not None:
            return square
        with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads the header only
            _check(image, data)
            turned = exif == "apply" and image.getexif().get(_ORIENTATION, 1) != 1
            plain = decoder == "native" and not turned and _is_plain(image)
            if plain and (square := _native(data, image.size, spec, box)) is not None:
                return square
            if decoder == "draft" and image.format == "JPEG":
                part = box.pixels(*image.size) if box else (0, 0, *image.size)
                enough = 2 * spec.image_size * max(image.size) // max(1, min(part[2] - part[0], part[3] - part[1]))
                image.draft(None, (enough, enough))
            image.load()
            seen = _opaque(ImageOps.exif_transpose(image) if turned else image)
            made = _resize(seen.crop(box.pixels(*seen.size)) if box else seen, spec, squash=box is not None)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text holds an address, which differs from run to run
        raise DataError("not a readable JPEG, PNG or WebP image: no such header") from error
    except Exception as error:  # PIL's plugins raise anything from SyntaxError to struct.error on hostile bytes
        raise DataError(f"not a readable JPEG, PNG or WebP image: {error or type(error).__name__}") from error
    return torch.from_numpy(np.array(made.convert("RGB"))).permute(2, 0, 1).contiguous()


def check_image(data: bytes, spec: InputSpec) -> None:
    """Decode `data` with `pil`, as evaluations do, and with `native`, as runs do by default.

    One may refuse what the other takes: PIL fills up with grey where the data of a JPEG turn into zeros.

    Raises:
        DataError: as `decode_image`; names the decoder if the other one takes the image.
    """
    by_pil = _refusal(data, spec, "pil")
    if by_pil is None and not _is_decoded_natively(data):
        return
    by_native = _refusal(data, spec, "native")
    if by_pil and by_native:
        raise by_pil
    if by_native:
        raise DataError(f"{by_native} (the decoder `native` refuses it, `pil` takes it)")
    if by_pil:
        raise DataError(f"{by_pil} (the decoder `pil` refuses it, `native` takes it)")


def _refusal(data: bytes, spec: InputSpec, decoder: Decoder) -> DataError | None:
    try:
        decode_image(data, spec, decoder=decoder)
    except DataError as error:
        return error
    return None


def _is_decoded_natively(data: bytes) -> bool:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        return _is_plain(image)


_ORIENTATION = 0x0112
_PASSED_OVER = {0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xED, 0xFE}
"""Segments of a JPEG before its frame that change nothing here: tables, JFIF, EXIF, IPTC, comments."""


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of the most usual image: a baseline JPEG of 8 bits, in grey or colour, alone in its file.

    None is for PIL to look at, which takes a twentieth of the time of decoding to read a header.
    """
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while len(segment := data[place : place + 10]) == 10 and segment[0] == 0xFF:
        if segment[1] == 0xC0 and segment[4] == 8 and segment[9] in (1, 3):
            height, width = int.from_bytes(segment[5:7], "big"), int.from_bytes(segment[7:9], "big")
            return (width, height) if 0 < width * height <= MAX_PIXELS else None
        if segment[1] not in _PASSED_OVER:
            return None
        place += 2 + int.from_bytes(segment[2:4], "big")
    return None


def _is_plain(image: Image.Image) -> bool:
    """Whether torchvision's decoders give what PIL gives, as far as PIL can say: it takes RGB of 16 bits for RGB."""
    return image.format in ("JPEG", "MPO", "PNG") and image.mode in ("RGB", "L") and not image.has_transparency_data


def _native(data: bytes, size: tuple[int, int], spec: InputSpec, box: Box | None) -> UInt8[Tensor, "3 h w"] | None:
    """None if torchvision makes no picture of 8 bits and that size of it: PIL does, or says why not."""
    from torchvision.io import ImageReadMode  # loads the operators
    from torchvision.transforms.v2 import functional as images

    held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    decode = torch.ops.image.decode_png if data[:4] == b"\x89PNG" else torch.ops.image.decode_jpeg
    pixels = decode(held, ImageReadMode.RGB.value)
    if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (3, size[1], size[0]):
        return None
    if box:
        left, top, right, bottom = box.pixels(*size)
        pixels, plan = pixels[:, top:bottom, left:right], _Plan((spec.image_size, spec.image_size), 0, 0)
    else:
        plan = _plan(*size, spec)
    width, height = plan.size
    if tuple(pixels.shape[1:]) != (height, width):
        resized = torch.empty(1, 3, height, width, dtype=torch.uint8)
        # what torchvision's resize calls; given its place, it leaves the channels apart, as they are wanted
        torch.ops.aten._upsample_bicubic2d_aa.out(pixels[None], [height, width], False, out=resized)
        pixels = resized[0]
    if plan.left or plan.top or plan.size != (spec.image_size, spec.image_size):
        pixels = images.crop(pixels, plan.top, plan.left, spec.image_size, spec.image_size)
    return pixels.contiguous()


def _check(image: Image.Image, data: bytes) -> None:
    width, height = image.size
    progressive = bool(image.info.get("progressive"))
    costly = progressive or image.format == "WEBP" or image.mode == "CMYK" or image.has_transparency_data
    if width * height > (most := MAX_COSTLY_PIXELS if costly else MAX_PIXELS):
        kind = "a WebP, progressive, transparent or CMYK image" if costly else "an image"
        raise DataError(f"{kind} of {width}x{height} pixels is over the limit of {most}")
    if progressive and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise DataError(f"a progressive JPEG of {scans} scans is over the limit of {MAX_SCANS}")
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


class _Plan(NamedTuple):
    """How an image becomes a square: resized, then cut out at an offset, with zeros where that lies outside."""

    size: tuple[int, int]
    left: int
    top: int


def _plan(width: int, height: int, spec: InputSpec) -> _Plan:
    side = spec.image_size
    if spec.resize_mode == "squash":
        size = (side, side)
    elif spec.resize_mode == "shortest":
        size = _shortest(width, height, side)
    else:
        ratio = max(height / side, width / side)
        size = (round(width / ratio), round(height / ratio))
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"an image of {width}x{height} pixels is too narrow to be resized to {side} pixels")
    left, top = (_offset(length, side) for length in size)
    return _Plan(size, left, top)


def _resize(image: Image.Image, spec: InputSpec, *, squash: bool) -> Image.Image:
    side = spec.image_size
    plan = _Plan((side, side), 0, 0) if squash else _plan(*image.size, spec)
    resized = image.resize(plan.size, Image.Resampling.BICUBIC)
    return resized.crop(
        (plan.left, plan.top, plan.left + side, plan.top + side)
    )  # PIL fills what lies outside with zeros


def _shortest(width: int, height: int, side: int) -> tuple[int, int]:
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _offset(length: int, side: int) -> int:
    # torchvision rounds a crop to even and a padding down
    return round((length - side) / 2) if length >= side else -((side - length) // 2)
