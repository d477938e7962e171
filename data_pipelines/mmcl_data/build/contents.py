"""The bytes of files, within limits and within the root, and what they are by their first bytes.

A picture or sound is stored as it is under the extension of what it holds, whatever its name says. What the decoders
of a stream do not read, but a kept library reads exactly, is rewritten without loss: BMP, TIFF and still GIF to PNG;
AIFF, AU, CAF, W64 and RF64 to FLAC. Of all else the reason is given. Nothing is decoded otherwise: that is
`mmcl data check`.
"""

import os
import re
import stat
from io import BytesIO
from pathlib import Path

import soundfile
from PIL import Image

from mmcl.errors import DataError
from mmcl_data.build.items import Contents, Item
from mmcl_data.decode import MAX_BYTES
from mmcl_data.decode.image import MAX_PIXELS
from mmcl_data.decode.text import decode_facts
from mmcl_data.scan import MAX_MEMBER_BYTES

MAX_SAMPLES = 64 * 2**20
"""Of all channels of a sound that is rewritten: a quarter of a gigabyte."""

_KNOWN = {
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "webp": rb"RIFF....WEBP",
    "wav": rb"RIFF....WAVE",
    "flac": rb"fLaC",
    "ogg": rb"OggS",
    "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
}
_PICTURES = {"BMP": rb"BM", "TIFF": rb"II\*\0|MM\0\*", "GIF": rb"GIF8[79]a"}
_SOUNDS = {"AIFF": rb"FORM....AIF[FC]", "AU": rb"\.snd", "CAF": rb"caff", "W64": rb"riff.{20}wave", "RF64": rb"RF64"}
_OTHERS = {"an MP4 or M4A": rb"....ftyp", "a Matroska or WebM": rb"\x1a\x45\xdf\xa3", "an AAC": rb"\xff[\xf0\xf1\xf9]"}
_FLAC = {"PCM_U8": "PCM_S8", "PCM_S8": "PCM_S8", "PCM_16": "PCM_16", "PCM_24": "PCM_24", "ULAW": "PCM_16",
         "ALAW": "PCM_16"}  # fmt: skip
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def read_files(root: Path, item: Item) -> Contents:
    """The contents of an item whose files lie below `root`.

    Raises:
        DataError: one of them cannot be read.
    """
    found = Contents([], list(item.captions), dict(item.facts), item.label)
    for name in item.files:
        match os.path.splitext(name)[1].lower():
            case ".txt":
                found.captions.append(read_file(root, name))
            case ".json":
                found.facts = decode_facts(read_file(root, name, MAX_BYTES["facts"])) | found.facts
            case ".cls":
                found.label = read_file(root, name)
            case _:
                found.media.append((name, read_file(root, name)))
    return found


def read_file(root: Path, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """The bytes of a file below `root`.

    Raises:
        DataError: it is missing, empty, above `limit`, no plain file, or a link that leaves `root`.
    """
    base, real = os.path.realpath(root), os.path.realpath(root / name)
    if os.path.commonpath([base, real]) != base:
        raise DataError(f"{name} is a link that leaves the root: name with --root the folder that holds all files")
    try:
        found = os.stat(real)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{name} is no plain file")
        if not 0 < found.st_size <= limit:
            raise DataError(f"{name} is empty" if not found.st_size else f"{name} is over the limit of {limit} bytes")
        with open(real, "rb") as file:
            return file.read(limit)
    except FileNotFoundError as error:
        raise DataError(f"{name} is missing") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def as_member(name: str, data: bytes) -> tuple[str, bytes]:
    """The extension that a picture or sound is stored under, and its bytes.

    Raises:
        DataError: it is nothing that a stream can decode.
    """
    if extension := _first(_KNOWN, data):
        return extension, data
    try:
        if form := _first(_PICTURES, data):
            return "png", _as_png(name, form, data)
        if _first(_SOUNDS, data):
            return "flac", _as_flac(name, data)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise anything, and soundfile what cffi makes of it
        raise DataError(f"{name} cannot be decoded: {type(error).__name__}") from error
    if other := _first(_OTHERS, data):
        raise DataError(f"{name} is {other} file, which is not read: turn it into FLAC first, as `ffmpeg -i` does")
    raise DataError(f"{name} is no picture or sound of a known kind: it begins with {data[:8]!r}")


def _first(table: dict[str, bytes], data: bytes) -> str:
    return next((name for name, magic in table.items() if re.match(magic, data[:64], re.DOTALL)), "")


def _as_png(name: str, form: str, data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=(form,)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{name}: {image.width}x{image.height} pixels are over the limit of {MAX_PIXELS}")
        if getattr(image, "n_frames", 1) != 1:
            raise DataError(f"{name} holds several pictures")
        if image.mode not in _PNG_MODES:
            raise DataError(f"{name}: a picture of mode {image.mode} has no PNG without loss")
        image.load()
        encoded = BytesIO()
        image.save(encoded, "PNG")
    return encoded.getvalue()


def _as_flac(name: str, data: bytes) -> bytes:
    with soundfile.SoundFile(BytesIO(data)) as sound:
        if sound.subtype not in _FLAC:
            raise DataError(f"{name}: a sound of {sound.subtype} samples has no FLAC without loss")
        if sound.frames * sound.channels > MAX_SAMPLES:
            raise DataError(f"{name}: {sound.frames} samples in {sound.channels} channels are over the limit")
        wave, encoded = sound.read(dtype="int32", always_2d=True), BytesIO()
        soundfile.write(encoded, wave, sound.samplerate, format="FLAC", subtype=_FLAC[sound.subtype])
    return encoded.getvalue()
