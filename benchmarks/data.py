"""Samples per second of our stream beside a plain webdataset pipeline: one process, the same shards, the same tensors.

The plain pipeline does what users write: read tars in order, decode with PIL and soundfile, tokenize, stack. It does
not shuffle and checks nothing. The floor is its decoding alone, of bytes that lie in memory.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from measure import Result, alternate, parser, ratio, report, table
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset

from mmcl.types import InputSpec
from mmcl_data.build.shards import write_shards
from mmcl_data.build.world import WorldConfig, make_world
from mmcl_data.build.world.samples import Job, make_samples
from mmcl_data.samples import DecodeConfig
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig

WORLD = WorldConfig()
SPEC = InputSpec(
    image_size=40,
    resize_mode="squash",
    sample_rate=WORLD.sample_rate,
    clip_samples=round(WORLD.clip_seconds * WORLD.sample_rate),
    context_length=24,
)
TENSORS = dict[str, Tensor]


class Plain:
    """The plain pipeline."""

    def __init__(self, shards: list[str], batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size
        self.tokenizer = SimpleTokenizer(context_length=SPEC.context_length)

    def raw(self) -> Iterator[dict[str, Any]]:
        """Samples as bytes, in the order of the tars."""
        return iter(WebDataset(self.shards, shardshuffle=False))

    def decode(self, sample: dict[str, Any]) -> tuple[Tensor, str, Tensor]:
        """One sample."""
        size = (SPEC.image_size, SPEC.image_size)
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        wave, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, sample["txt"].decode().strip(), torch.from_numpy(wave)

    def batches(self, samples: Iterable[dict[str, Any]]) -> Iterator[TENSORS]:
        """Decoded batches."""
        rows = []
        for sample in samples:
            rows.append(self.decode(sample))
            if len(rows) == self.batch_size:
                images, captions, waves = zip(*rows, strict=True)
                text = self.tokenizer(list(captions))
                yield {"image": torch.stack(images), "text": text, "audio": torch.stack(waves)}
                rows = []


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=2048, help="samples of an epoch (default: 2048)")
    arguments.add_argument("--batch-size", type=int, default=64, help="must divide the samples (default: 64)")
    args = arguments.parse_args()
    if args.samples % args.batch_size:
        arguments.error(f"--samples {args.samples} is no multiple of --batch-size {args.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        results = compare(make_shards(Path(folder) / "shards", args.samples), args)
    report(results, args.json)


def make_shards(folder: Path, samples: int) -> Path:
    """World samples that have all three modalities, in four shards."""
    world = make_world(WORLD, seed=0)
    made = make_samples(world, [Job("train", "image_audio_text", index) for index in range(samples)])
    write_shards(made, folder, samples_per_shard=-(-samples // 4))
    return folder


def compare(folder: Path, args: Any) -> dict[str, Result]:
    """One epoch of each contestant a round."""
    config = DataConfig(sources={"world": SourceConfig(shards=str(folder))}, decode=DecodeConfig(images="pil"))
    stream = ShardStream(config, SPEC, args.batch_size, seed=0)
    plain = Plain([str(path) for path in sorted(folder.glob("*.tar"))], args.batch_size)
    in_memory = list(plain.raw())
    per_epoch = args.samples // args.batch_size
    batches = stream.batches()

    def ours() -> list[Any]:
        return [next(batches).values for _ in range(per_epoch)]  # each round another epoch, in another order

    def theirs() -> list[TENSORS]:
        return list(plain.batches(plain.raw()))

    def decoding() -> None:
        for sample in in_memory:
            plain.decode(sample)

    assert_same_samples(ours(), theirs())
    seconds = alternate(
        {"mmcl ShardStream": ours, "plain webdataset": theirs, "floor: decoding": decoding}, args.rounds
    )
    print(f"{args.samples} samples of image, sound and caption, batches of {args.batch_size}, one process")
    print(table(seconds, "floor: decoding", args.samples, "samples"))
    value = ratio(seconds, "plain webdataset", "mmcl ShardStream")
    return {"shard_stream_rate_over_webdataset": Result(value=value, target=1.0, better="higher")}


def assert_same_samples(ours: list[Any], theirs: list[TENSORS]) -> None:
    """Both gave the same tensors in whatever order, else the times compare different things."""
    assert rows_of(ours) == rows_of(theirs)


def rows_of(batches: list[Any]) -> list[tuple[bytes, ...]]:
    """The bytes of each sample's tensors, sorted."""
    values = [[value.numpy() for value in (b["image"], b["text"], b["audio"])] for b in batches]
    return sorted(tuple(part.tobytes() for part in row) for batch in values for row in zip(*batch, strict=True))


if __name__ == "__main__":
    main()
