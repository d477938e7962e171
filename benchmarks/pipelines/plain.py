"""What users write on webdataset 1.0.2: PIL or soundfile, torch's DataLoader, no checks.

Images become bytes as ours do. Sounds are read whole, as torchaudio and librosa do unless asked otherwise: all of the
file is decoded, mixed and resampled, and then its middle is cut out.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from comparing import rows_of, spectra, thumbnails
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from serving import Rows, options, serve
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize
from webdataset.compat import WebDataset


class Decoding:
    """Samples to tensors, in a worker."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.tokenizer = spec, SimpleTokenizer(context_length=spec["context_length"])
        self.resize = Resize(spec["image_size"], interpolation=InterpolationMode.BICUBIC)
        self.crop, self.tensor = CenterCrop(spec["image_size"]), PILToTensor()

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Image or sound, and tokens."""
        value = self.image(sample["jpg"]) if "jpg" in sample else self.sound(sample["flac"])
        return value, self.tokenizer(sample["txt"].decode())[0]

    def image(self, data: bytes) -> Tensor:
        """(3, h, w) of uint8."""
        return self.tensor(self.crop(self.resize(Image.open(io.BytesIO(data)).convert("RGB"))))

    def sound(self, data: bytes) -> Tensor:
        """(t,) of float32, from the middle."""
        rate, length = self.spec["sample_rate"], self.spec["clip_samples"]
        wave, own_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        mono = wave.mean(axis=1)
        if own_rate != rate:
            mono = soxr.resample(mono, own_rate, rate, quality="HQ")  # as librosa does
        start = max(0, (len(mono) - length) // 2)
        cut = mono[start : start + length]
        return torch.from_numpy(np.pad(cut, (0, length - len(cut))))


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def main() -> None:
    """Answer."""
    asked = options()
    torch.set_num_threads(1)
    dataset: Any = WebDataset(asked["tars"], shardshuffle=False, resampled=True)
    dataset = dataset.shuffle(asked["shuffle"]).map(Decoding(asked["spec"])).batched(asked["batch_size"])
    loader = DataLoader(dataset, batch_size=None, num_workers=asked["workers"])
    serve(endless(loader), lambda batch: len(batch[0]), look)


def look(batch: Any) -> Rows:
    """Its captions, with images or sounds."""
    values, texts = batch
    return rows_of(texts, thumbnails(values) if values.ndim == 4 else spectra(values))


if __name__ == "__main__":
    main()
