"""What is drawn and heard is what the ground truth says."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcl_data.build.world import Scene, Sound, WorldConfig
from mmcl_data.build.world.config import COLOURS, PITCHES, SHAPES, TIMBRES
from mmcl_data.build.world.drawing import draw, encode_image
from mmcl_data.build.world.scenes import LAYOUTS, sample_scene
from mmcl_data.build.world.sounds import sample_sound
from mmcl_data.build.world.synthesis import encode_sound, render

CONFIG = WorldConfig(num_shapes=10, num_colours=10, num_timbres=10)
RATE = CONFIG.sample_rate


def scenes(count: int) -> list[Scene]:
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        size = 1 + seed % 3
        pairs = [(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(size)]
        made.append(sample_scene(pairs, LAYOUTS[size][seed // 3 % len(LAYOUTS[size])], CONFIG, rng))
    return made


def pitch_heard(samples: np.ndarray) -> str:
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
    frequency = np.argmax(power) * RATE / (1 << 16)
    return min(PITCHES, key=lambda word: abs(np.log(max(frequency, 1) / PITCHES[word])))


def part(samples: np.ndarray, start: float, end: float) -> np.ndarray:
    return samples[round(start * RATE) : round(end * RATE)].astype(float)


@pytest.mark.parametrize("image_size", [64, 256])
def test_an_objects_pixels_have_its_named_colour(image_size):
    checked = set()
    for seed, scene in enumerate(scenes(150)):
        content = encode_image(draw(scene, image_size, np.random.default_rng(seed)), "jpg")
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)
        for thing in scene.objects:
            if image_size == 64 and (thing.texture != "plain" or thing.size == "small"):
                continue  # half a pixel beside the centre is another colour
            # a ring is hollow and a moon is a crescent on its left
            offset = {"ring": -0.74, "moon": -0.66}.get(thing.shape, 0.0) * thing.radius * np.exp(1j * thing.angle)
            x, y = int((thing.x + offset.real) * image_size), int((thing.y + offset.imag) * image_size)
            if thing.texture != "plain" and offset:
                continue
            distance = {name: np.abs(pixels[y, x] - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distance, key=distance.__getitem__) == thing.colour, thing
            checked.add((thing.colour, thing.texture))
    assert {colour for colour, _ in checked} == set(COLOURS)


def test_no_object_vanishes_in_the_background():
    for seed, scene in enumerate(scenes(60)):
        with_objects = np.asarray(draw(scene, 64, np.random.default_rng(seed))).astype(int)
        without = np.asarray(draw(Scene((), "single"), 64, np.random.default_rng(seed))).astype(int)
        seen = np.abs(with_objects - without).max(-1) > 40
        for thing in scene.objects:
            y, x = np.mgrid[:64, :64] / 64
            near = (x - thing.x) ** 2 + (y - thing.y) ** 2 < thing.radius**2
            assert seen[near].mean() > 0.15, thing


def test_relations_hold_of_the_coordinates_without_overlap_and_inside_the_frame():
    for scene in scenes(200):
        for thing in scene.objects:
            for centre in (thing.x, thing.y):
                assert thing.radius <= centre <= 1 - thing.radius
        for i, relation, j in scene.relations:
            a, b = scene.objects[i], scene.objects[j]
            along = {"left": b.x - a.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
            assert along > a.radius + b.radius - 1e-3
            if scene.layout in ("row", "column"):
                assert along > abs(b.y - a.y if relation == "left" else b.x - a.x)


def test_every_layout_occurs_and_a_large_object_is_larger_than_any_small_one():
    made = scenes(200)
    assert {scene.layout for scene in made} == {"single", "row", "column", "pair_above", "pair_below"}
    radii = {size: [o.radius for s in made for o in s.objects if o.size == size] for size in ("large", "small")}
    assert min(radii["large"]) > max(radii["small"])


@pytest.mark.parametrize("timbre", TIMBRES)
def test_the_pitch_of_an_event_is_heard_in_every_timbre(timbre):
    for number, pitch in enumerate(PITCHES):
        rng = np.random.default_rng(number)
        sound = sample_sound([(pitch, timbre)], "solo", CONFIG, rng)
        (event,) = sound.events
        samples = render(sound, CONFIG.clip_seconds, RATE, rng)
        assert pitch_heard(part(samples, event.start, event.start + event.duration)) == pitch


def test_events_of_a_sequence_are_heard_in_order_with_silence_between():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pairs = [("low", "organ"), ("shrill", "horn"), ("mid", "whistle")][: 2 + seed % 2]
        sound = sample_sound(pairs, "sequence", CONFIG, rng, ["loud"] * len(pairs))
        samples = render(sound, CONFIG.clip_seconds, RATE, rng)
        end = 0.0
        for event in sound.events:
            before = part(samples, end, event.start)
            during = part(samples, event.start, event.start + event.duration)
            assert before.std() < 0.1 * during.std()
            assert pitch_heard(during) == event.pitch
            end = event.start + event.duration
        assert end < CONFIG.clip_seconds


def test_overlapping_events_start_together_and_last_alike():
    for seed in range(50):
        sound: Sound = sample_sound(
            [("low", "organ"), ("high", "bell")], "overlap", CONFIG, np.random.default_rng(seed)
        )
        first, second = sound.events
        common = min(e.start + e.duration for e in sound.events) - second.start
        assert 0 <= second.start - first.start <= 0.1
        assert common > 0.6 * max(first.duration, second.duration)
        assert max(e.start + e.duration for e in sound.events) <= CONFIG.clip_seconds


def test_loud_is_louder_than_quiet_and_nothing_clips():
    for timbre in TIMBRES:
        peaks = {}
        for loudness in ("loud", "quiet"):
            rng = np.random.default_rng(0)
            sound = sample_sound([("mid", timbre)], "solo", CONFIG, rng, [loudness])
            peaks[loudness] = int(np.abs(render(sound, CONFIG.clip_seconds, RATE, rng)).max())
        assert 2 * peaks["quiet"] < peaks["loud"] < 32000


@pytest.mark.parametrize(("clip_seconds", "sample_rate"), [(0.5, 8000), (1.0, 48000)])
def test_flac_gives_back_the_samples_at_other_lengths_and_rates(clip_seconds, sample_rate):
    config = WorldConfig(clip_seconds=clip_seconds, sample_rate=sample_rate, num_timbres=10)
    for timbre in TIMBRES:
        rng = np.random.default_rng(1)
        sound = sample_sound([("shrill", timbre), ("deep", timbre)], "sequence", config, rng)
        samples = render(sound, clip_seconds, sample_rate, rng)
        content = encode_sound(samples, sample_rate)
        assert content == encode_sound(samples, sample_rate)
        decoded, rate = soundfile.read(io.BytesIO(content), dtype="int16")
        assert rate == sample_rate and len(decoded) == round(clip_seconds * sample_rate)
        np.testing.assert_array_equal(decoded, samples)
