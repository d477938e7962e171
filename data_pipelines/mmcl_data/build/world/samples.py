"""One sample from its place in the data set: nothing else decides its bytes.

A sample's random numbers are seeded by (seed, split, source, index, attempt), so that neither the number of samples
nor the number of workers, nor what was made before it, changes it. Workers import this module, which is why nothing
here needs torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmcl_data.build.world.captions import choose, foils, meaning, say
from mmcl_data.build.world.config import SIZES
from mmcl_data.build.world.drawing import draw, encode_image
from mmcl_data.build.world.pairs import SOURCES, SPLITS, Source, Split, Words, World, pick, sound_of
from mmcl_data.build.world.scenes import LAYOUTS, Scene, sample_scene
from mmcl_data.build.world.sounds import Sound, sample_order, sample_sound
from mmcl_data.build.world.synthesis import encode_sound, render

SAMPLES_PER_CLASS = 12
"""Of the zero-shot classification sets."""


@dataclass(frozen=True, slots=True)
class Job:
    """A sample's place. `attempt` counts the descriptions passed over because an earlier sample has them."""

    split: Split
    source: Source
    index: int
    attempt: int = 0


class _Content(NamedTuple):
    scene: Scene | None
    sound: Sound | None


def make_samples(world: World, jobs: Sequence[Job]) -> list[dict[str, bytes | str]]:
    """The samples of `jobs`, as `write_shards` takes them."""
    return [_make_class_sample(world, job) if job.split == "classes" else _make_sample(world, job) for job in jobs]


def job_meaning(world: World, job: Job) -> tuple[Any, ...]:
    """What the sample's shortest captions say; where a scene has a sound, the sound, which says less."""
    content = _describe(world, job, _rng(world, job))
    subjects = [subject for subject in content if subject is not None]
    return meaning(subjects[-1])


def class_pairs(world: World, source: Source) -> tuple[Words, ...]:
    """The classes of the zero-shot sets, in the order of their numbers."""
    return world.everything[source]


def _rng(world: World, job: Job) -> np.random.Generator:
    place = SPLITS.index(job.split), SOURCES.index(job.source), job.index, job.attempt
    return np.random.default_rng([world.seed, *place])


def _describe(world: World, job: Job, rng: np.random.Generator) -> _Content:
    config = world.config
    pairs = (world.train if job.split == "train" else world.everything)[job.source]
    # test samples are as large as any, so that no caption is also true of a part of another sample
    fewest = config.min_objects if job.split == "train" else config.max_objects
    count = int(rng.integers(fewest, config.max_objects + 1))
    if job.source == "image_text":
        layout = LAYOUTS[count][rng.integers(len(LAYOUTS[count]))]
        return _Content(sample_scene(pick(pairs, count, rng), layout, config, rng), None)
    if job.source == "audio_text":
        return _Content(None, sample_sound(pick(pairs, count, rng), sample_order(count, rng), config, rng))
    chosen = pick(pairs, count, rng, key=lambda pair: sound_of(pair, config))
    scene = sample_scene(chosen, "single" if count == 1 else "row", config, rng)
    loudnesses = ["loud" if thing.size == SIZES[0] else "quiet" for thing in scene.objects]
    heard = [sound_of(pair, config) for pair in chosen]
    return _Content(scene, sample_sound(heard, "solo" if count == 1 else "sequence", config, rng, loudnesses))


def _make_sample(world: World, job: Job) -> dict[str, bytes | str]:
    rng = _rng(world, job)
    content = _describe(world, job, rng)
    subjects = {name: subject for name, subject in content._asdict().items() if subject is not None}
    wordings = {name: choose(subject, world.config, rng) for name, subject in subjects.items()}
    captions = {name: say(subject, wordings[name]) for name, subject in subjects.items()}
    caption = captions[list(captions)[rng.integers(len(captions))]]
    facts: dict[str, Any] = {"kind": job.source, "caption": caption, "captions": captions, **_facts(world, content)}
    if job.split == "test":
        facts["foils"] = {name: foils(subject, wordings[name], rng) for name, subject in subjects.items()}
    return {
        "__key__": f"{job.source}-{job.index:08d}",
        **_media(world, content, rng),
        "txt": caption.encode(),
        "json": _json(facts),
    }


def _make_class_sample(world: World, job: Job) -> dict[str, bytes | str]:
    rng = _rng(world, job)
    number = job.index // SAMPLES_PER_CLASS
    pairs = [class_pairs(world, job.source)[number]]
    if job.source == "image_text":
        content = _Content(sample_scene(pairs, "single", world.config, rng), None)
    else:
        content = _Content(None, sample_sound(pairs, "solo", world.config, rng))
    return {
        "__key__": f"{job.index:06d}",
        **_media(world, content, rng),
        "cls": str(number).encode(),
        "json": _json(_facts(world, content)),
    }


def _facts(world: World, content: _Content) -> dict[str, Any]:
    facts: dict[str, Any] = {"held_out": False}
    if content.scene is not None:
        facts["scene"] = content.scene.facts()
        facts["held_out"] |= any((o.colour, o.shape) in world.held_out_image for o in content.scene.objects)
    if content.sound is not None:
        facts["sound"] = content.sound.facts()
        facts["held_out"] |= any((e.pitch, e.timbre) in world.held_out_audio for e in content.sound.events)
    return facts


def _media(world: World, content: _Content, rng: np.random.Generator) -> dict[str, bytes]:
    config, media = world.config, {}
    if content.scene is not None:
        image = draw(content.scene, config.image_size, rng)
        media[config.image_format] = encode_image(image, config.image_format)
    if content.sound is not None:
        samples = render(content.sound, config.clip_seconds, config.sample_rate, rng)
        media["flac"] = encode_sound(samples, config.sample_rate)
    return media


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()
