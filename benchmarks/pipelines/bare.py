"""What nobody can leave out: native decoding, and resizing of images, of bytes that lie in memory. In one thread."""

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import soundfile
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as images

HELD = 200
"""Samples in memory."""


def decoder_of(spec: Mapping[str, Any]) -> Callable[[str, bytes], None]:
    """What decodes a member, by its extension."""
    side, seconds = spec["image_size"], spec["clip_samples"] / spec["sample_rate"]

    def decode(extension: str, data: bytes) -> None:
        if extension == "jpg":
            pixels: Any = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            images.resize(pixels, [side, side], interpolation=images.InterpolationMode.BICUBIC, antialias=True)
        else:
            with soundfile.SoundFile(io.BytesIO(data)) as held:
                held.read(round(seconds * held.samplerate), "float32")

    return decode


def members(tars: list[str]) -> Iterator[tuple[str, bytes]]:
    """Extension and bytes of images and sounds."""
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                opened = tar.extractfile(member)
                extension = member.name.rpartition(".")[2]
                if opened is not None and extension != "txt":
                    yield extension, opened.read()


def batches(asked: Mapping[str, Any]) -> Iterator[int]:
    """Decodes as many samples as a batch has, and says how many."""
    torch.set_num_threads(1)
    decode, size = decoder_of(asked["spec"]), asked["batch_size"]
    endless = itertools.cycle(list(itertools.islice(members(asked["tars"]), HELD)))
    while True:
        for extension, data in itertools.islice(endless, size):
            decode(extension, data)
        yield size


if __name__ == "__main__":
    from serving import options, serve

    serve(batches(options()), lambda batch: batch, lambda batch: [])
