"""Composing sounds of single events, with all their captions, beside decoding the same parts and no more."""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from measure import Result, alternate, parser, ratio, report, table

from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs
from mmcl_data.build.shards import write_shards
from mmcl_data.compose.clips import Clips, ClipSource
from mmcl_data.compose.composer import ComposeConfig, Composed, Composer
from mmcl_data.compose.render import render_audio
from mmcl_data.compose.tree import events_of
from mmcl_data.decode.audio import decode_audio
from mmcl_data.index import build_index
from mmcl_data.scan import read_sample

NUM_CLIPS, NUM_LABELS = 64, 16


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__)
    arguments.add_argument("--sounds", type=int, default=64, help="sounds composed in a round (default: 64)")
    arguments.add_argument("--rate", type=int, default=48_000, help="Hz (default: 48000)")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of a sound; its clips have half (default: 10)")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), args)
    report(results, args.json)


def compare(folder: Path, args: Any) -> dict[str, Result]:
    """The same sounds in every round."""
    samples = round(args.seconds * args.rate)
    spec = InputSpec(image_size=1, resize_mode="squash", sample_rate=args.rate, clip_samples=samples, context_length=77)
    write_shards(make_clips(args.rate, samples // 2), folder / "clips")
    clips = Clips()
    clips.add(build_index(str(folder / "clips"), folder / "index"), ClipSource(shards=str(folder / "clips")))
    composer = Composer(clips, spec, ComposeConfig())
    parts = {
        f"{Path(clip.shard).name}#{clip.entry.key}": next(iter(read_sample(Blobs(), clip.shard, clip.entry).values()))
        for found in clips.by_label.values()
        for clip in found
    }
    made = [composer.sample(number) for number in range(args.sounds)]
    alone = replace(spec, clip_samples=samples // 2)  # nothing is padded

    def composing() -> None:
        for number in range(args.sounds):
            composer.sample(number)

    def decoding() -> list[dict[str, np.ndarray]]:
        return [{name: decode_audio(parts[name], alone).numpy() for name in sound.sources} for sound in made]

    check_same(made, decoding(), spec)
    seconds = alternate({"mmcl Composer": composing, "floor: decoding": decoding}, args.rounds)
    count = sum(len(events_of(sound.tree)) for sound in made)
    print(f"{args.sounds} sounds of {args.seconds:g} s at {args.rate} Hz, of {count} clips, one process")
    print(table(seconds, "floor: decoding", args.sounds, "sounds"))
    value = ratio(seconds, "mmcl Composer", "floor: decoding")
    print(f"without decoding, composing takes {value - 1:.2f} times as long as decoding")
    return {"compose_time_over_decoding": Result(value=value, target=2.0, better="lower")}


def make_clips(rate: int, samples: int) -> Iterator[dict[str, bytes | str]]:
    """Tones in noise that fade, so that they are neither silent nor trivial to decode."""
    random, t = np.random.default_rng(0), np.arange(samples) / rate
    for number in range(NUM_CLIPS):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * t) + 0.05 * random.standard_normal(samples)
        flac = io.BytesIO()
        soundfile.write(flac, tone * np.exp(-t), rate, format="FLAC", subtype="PCM_16")
        label = f'{{"label": "tone {number % NUM_LABELS}"}}'
        yield {"__key__": f"{number:03d}", "flac": flac.getvalue(), "json": label.encode()}


def check_same(made: list[Composed], decoded: list[dict[str, np.ndarray]], spec: InputSpec) -> None:
    """What the floor decodes are the parts of what was composed, else the times compare different things."""
    for sound, waves in zip(made, decoded, strict=True):
        again = render_audio(sound.tree, waves, spec.sample_rate, spec.clip_samples)
        assert np.array_equal(again, sound.audio.numpy()), sound.sources


if __name__ == "__main__":
    main()
