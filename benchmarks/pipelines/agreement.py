"""Whether pipelines give what the shards hold, so that no time is taken of something else."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import soxr
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from pipelines.comparing import spectra, thumbnails
from pipelines.turns import Pipeline
from torchvision.transforms.v2.functional import pil_to_tensor

TOLERANCE = 0.02
"""Of cells of images in 0..1, and of amplitudes as shares of the whole."""


class _Member(NamedTuple):
    tar: Path
    name: str
    offset: int
    size: int


class Reference:
    """What the samples of some shards are, by the tokens of their captions; decoded by PIL, resampled by soxr."""

    def __init__(self, folder: Path, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.members: dict[tuple[int, ...], _Member] = {}
        tokenizer = SimpleTokenizer(context_length=spec["context_length"])
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                found = [_Member(path, each.name, each.offset_data, each.size) for each in tar]
            for value, text in zip(found[::2], found[1::2], strict=True):
                self.members[tuple(tokenizer(_read(text).decode())[0].tolist())] = value

    def check(self, name: str, pipeline: Pipeline) -> None:
        """Raise `AssertionError` if its next batch is not what it should be."""
        rows = pipeline.ask(look=1)["rows"]
        assert rows, f"{name}: an empty batch"
        for tokens, shown in rows:
            member = self.members.get(tuple(tokens))
            assert member is not None, f"{name}: a caption that is in no sample: {tokens}"
            expected = self._shown(member)
            apart = float((torch.tensor(shown) - expected).abs().max())
            if member.name.endswith("flac"):
                apart /= float(expected.norm())
            assert apart <= TOLERANCE, f"{name}: {member.name} is {apart:.3f} apart"

    def _shown(self, member: _Member) -> torch.Tensor:
        data = io.BytesIO(_read(member))
        if member.name.endswith("jpg"):
            side = self.spec["image_size"]
            image = Image.open(data).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            return thumbnails(pil_to_tensor(image)[None])[0]
        wave, rate = soundfile.read(data, dtype="float32", always_2d=True)
        wanted = self.spec["clip_samples"] / self.spec["sample_rate"]
        mono = soxr.resample(wave[: round(wanted * rate)].mean(axis=1), rate, self.spec["sample_rate"], quality="HQ")
        return spectra(torch.from_numpy(mono)[None, : self.spec["clip_samples"]])[0]


def _read(member: _Member) -> bytes:
    with member.tar.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
