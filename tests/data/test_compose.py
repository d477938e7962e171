"""Sounds composed of clips in shards: what they are made of, what is said of them, and that it is always the same."""

import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import soundfile
from compose_cases import RATE, clip_sample, collect, flac, tone

from mmcl.errors import ConfigError, ShardDamaged, ShardMissing, TooManyBadSamples
from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs
from mmcl_data.build.shards import write_shards
from mmcl_data.build.world import WorldConfig, build_world
from mmcl_data.check import check_source
from mmcl_data.compose.captions import read_caption
from mmcl_data.compose.clips import Clips, ClipSource
from mmcl_data.compose.composer import ComposeConfig, Composer
from mmcl_data.compose.render import loudness
from mmcl_data.compose.shards import ShardOptions, compose_shards
from mmcl_data.compose.tree import canonical, entails, events_of
from mmcl_data.decode.text import decode_facts
from mmcl_data.index import build_index
from mmcl_data.scan import expand_shards, read_sample, scan_shard

SPEC = InputSpec(image_size=1, resize_mode="squash", sample_rate=RATE, clip_samples=2 * RATE, context_length=77)
NAMES = ("dog", "rain", "an owl", "church bells", "hen", "wind")
TEN = [clip_sample(f"{n:03d}", {"label": NAMES[n % 6]}, flac=flac(tone(200 + 100 * n))) for n in range(10)]


@pytest.fixture
def composer(tmp_path):
    return Composer(collect(TEN, tmp_path / "clips"), SPEC, ComposeConfig(events=(1, 1, 1)), seed=3)


def labels(clips: Clips) -> list[str]:
    return sorted(clips.by_label)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"label": "Dog"}, "dog"),
        ({"labels": ["church_bells"]}, "church bells"),
        ({"category": "Chirp, tweet", "class": "other"}, "chirp (tweet)"),
        ({"label": 7, "class": "hen"}, "hen"),
    ],
)
def test_a_label_is_found_where_data_sets_keep_it(tmp_path, facts, expected):
    assert labels(collect([clip_sample("0", facts)], tmp_path / "clips")) == [expected]


def test_a_label_is_found_by_the_number_of_the_class_or_in_the_caption(tmp_path):
    (tmp_path / "names.txt").write_text("dog\nhen\n")
    samples = [clip_sample("0", cls=b"1"), clip_sample("1", cls=b"7", txt=b"The sound of rain.")]
    found = collect(samples, tmp_path / "clips", classnames=str(tmp_path / "names.txt"))
    assert labels(found) == ["hen", "rain"]
    with pytest.raises(ConfigError, match=r"classnames=.*gone"):
        collect(samples, tmp_path / "again", classnames="gone.txt")


def test_what_is_no_single_event_is_left_out_and_counted(tmp_path):
    samples = [
        clip_sample("0", {"label": "dog"}),
        clip_sample("1", {"labels": ["dog", "hen"]}),
        clip_sample("2", {"label": "rain before noon"}),
        clip_sample("3", json=b"{"),
        clip_sample("4", {"label": "dog", "kind": "speech"}),
        {"__key__": "5", "txt": b"no sound", "json": b"{}"},
    ]
    clips = collect(samples, tmp_path / "clips")
    assert len(clips) == 2
    assert sum(clips.left_out.values()) == 3
    assert any("no name in any of label, labels" in why for why in clips.left_out)
    effects = collect(samples, tmp_path / "effects", only={"kind": "effect"})
    assert len(effects) == 0
    assert "kind is ..." in effects.left_out


def test_listed_events_are_taken_where_no_other_is_heard(tmp_path):
    events = [
        {"label": "Bark", "start": 0.0, "end": 1.5},
        {"label": "Rain", "start": 2.0, "end": 4.0},
        {"label": "Wind", "start": 3.5, "end": 5.0},
        {"label": "Click", "start": 5.5, "end": 5.6},
        {"label": "Bell", "start": 6.0, "end": 7.0},
    ]
    clips = collect([clip_sample("0", {"events": events})], tmp_path / "clips")
    assert {label: clip.span for label, (clip,) in clips.by_label.items()} == {"bark": (0.0, 1.5), "bell": (6.0, 7.0)}
    odd = collect([clip_sample("0", {"events": [{"label": "a"}]})], tmp_path / "odd")
    assert list(odd.left_out) == ["an event without label, start and end"]


def test_a_listed_event_is_cut_out_of_its_sound(tmp_path):
    both = np.concatenate([tone(400, 2.0), tone(1500, 2.0)])
    first, second = ({"label": name, "start": at, "end": at + 1.0} for name, at in (("low", 0.5), ("high", 2.5)))
    clips = collect([clip_sample("0", {"events": [first, second]}, flac=flac(both))], tmp_path / "clips")
    made = Composer(clips, SPEC, ComposeConfig(events=(1, 0, 0), loudness=0)).sample(0)
    assert sorted(made.sources) == ["000000.tar#0@0.5", "000000.tar#0@2.5"]
    spectrum = np.abs(np.fft.rfft(made.audio.numpy()))
    loudest = {round(float(hz)) for hz in np.argsort(spectrum)[-4:] * RATE / len(made.audio)}
    assert loudest <= set(range(390, 411)) | set(range(1490, 1511))


def test_attributes_come_from_their_fields_and_are_swapped(tmp_path):
    samples = [
        clip_sample(str(n), {"sound": {"events": [{"timbre": name, "pitch": pitch, "loudness": loud}]}})
        for n, (name, pitch, loud) in enumerate([("bell", "deep", "loud"), ("horn", "high", "quiet")])
    ]
    fields = {"loudness": "sound.events.loudness", "pitch": "sound.events.pitch"}
    clips = collect(samples, tmp_path / "clips", label=("sound.events.timbre",), attributes=fields)
    composer = Composer(clips, SPEC, ComposeConfig(events=(1, 0, 0), negatives=9))
    swapped = set()
    for number in range(10):
        made = composer.sample(number)
        assert {event.phrase for event in events_of(made.tree)} == {"loud deep bell", "quiet high horn"}
        swapped |= {read_caption(said) for operator, said in made.negatives if operator == "att_swap"}
    phrases = {event.label for tree in swapped for event in events_of(tree)}
    assert phrases == {"quiet deep bell", "loud high horn", "loud high bell", "quiet deep horn"}


def test_what_is_said_is_true_and_what_is_wrong_is_not(composer):
    for number in range(60):
        made = composer.sample(number)
        tree = canonical(made.tree)
        said = [read_caption(text) for text in made.captions]
        assert set(said) == {tree}
        assert len(set(made.captions)) == len(made.captions) >= 1
        assert all(entails(tree, read_caption(text)) and read_caption(text) != tree for text in made.positives)
        wrong = [read_caption(negative.caption) for negative in made.negatives]
        assert len(set(wrong)) == len(wrong) >= 2
        assert not any(entails(tree, claim) for claim in wrong)
        assert not {n.caption for n in made.negatives} & {*made.captions, *made.positives}


def test_a_part_of_several_events_brings_a_negative_of_its_own(composer):
    for number in range(30):
        made = composer.sample(number)
        size = len(events_of(made.tree))
        sizes = [Counter(len(events_of(read_caption(text))) for text in texts)
                 for texts in (made.positives, [negative.caption for negative in made.negatives])]  # fmt: skip
        for several in range(2, size):
            assert sizes[0][several] == sizes[1][several]


def test_labels_differ_within_a_sound_and_are_drawn_evenly_whatever_their_number_of_clips(tmp_path):
    samples = [clip_sample(f"{n:03d}", {"label": "dog" if n < 30 else NAMES[n % 5 + 1]}) for n in range(35)]
    composer = Composer(collect(samples, tmp_path / "clips"), SPEC, ComposeConfig(events=(1, 0, 0)))
    drawn: Counter[str] = Counter()
    for number in range(300):
        found = [event.label for event in events_of(composer.sample(number).tree)]
        assert len(set(found)) == 2
        drawn.update(found)
    assert set(drawn) == set(NAMES)
    assert all(70 < count < 130 for count in drawn.values())


def test_a_sound_follows_from_seed_number_and_epoch_and_from_nothing_before(composer, tmp_path):
    def bits(made):
        return made.audio.numpy().tobytes(), json.dumps(made.facts())

    alone = bits(composer.sample(7, epoch=2))
    composer.sample(1)
    copy = pickle.loads(pickle.dumps(composer))
    assert bits(copy.sample(7, epoch=2)) == bits(composer.sample(7, epoch=2)) == alone
    others = [
        composer.sample(8, 2),
        composer.sample(7, 3),
        Composer(composer.clips, SPEC, composer.config, 4).sample(7, 2),
    ]
    assert len({bits(made) for made in others} | {alone}) == 4


def test_a_seed_gives_what_it_gave_before(composer):
    """A change here changes every run: it needs a word in the commit that makes it."""
    made = composer.sample(0)
    assert made.captions == (
        "quiet rain along with loud hen, then loud dog",
        "loud dog, but before that quiet rain and loud hen at the same time",
    )
    assert made.sources == ("000001.tar#004", "000000.tar#001", "000002.tar#006")


def test_a_clip_that_cannot_be_decoded_gives_its_place_to_another(tmp_path):
    samples = [
        clip_sample(f"{n:03d}", {"label": NAMES[n % 3]}, **({"flac": b"fLaC nothing"} if n < 3 else {}))
        for n in range(12)
    ]
    config = ComposeConfig(events=(1, 0, 0))
    composer = Composer(collect(samples, tmp_path / "clips"), SPEC, config, seed=1)
    rejected = [error.key for number in range(40) for error in composer.sample(number).rejected]
    assert set(rejected) == {"000", "001", "002"}
    bad = collect([clip_sample(str(n), {"label": NAMES[n]}, flac=b"fLaC") for n in range(4)], tmp_path / "bad")
    with pytest.raises(TooManyBadSamples, match="8 clips in a row"):
        Composer(bad, SPEC).sample(0)


def test_a_shard_that_is_gone_is_an_error_and_no_bad_clip(composer, tmp_path):
    for shard in (tmp_path / "clips").glob("*.tar"):
        shard.unlink()
    with pytest.raises((ShardMissing, ShardDamaged)):
        composer.sample(0)


def test_clips_of_shards_that_are_called_alike_are_told_apart(tmp_path):
    clips = Clips()
    for name, hz in (("dog", 400), ("rain", 1500)):
        write_shards([clip_sample("0", {"label": name}, flac=flac(tone(hz)))], tmp_path / name)
        clips.add(
            build_index(str(tmp_path / name), tmp_path / f"{name}.index"), ClipSource(shards=str(tmp_path / name))
        )
    made = Composer(clips, SPEC, ComposeConfig(events=(1, 0, 0))).sample(0)
    assert len(set(made.sources)) == 2
    spectrum = np.abs(np.fft.rfft(made.audio.numpy()))
    peaks = [spectrum[round(hz * len(made.audio) / RATE) + np.arange(-9, 10)].max() for hz in (400, 1500)]
    assert min(peaks) > 0.1 * max(peaks)


def test_loudness_is_made_and_said_where_it_is_not_known(tmp_path):
    composer = Composer(collect(TEN, tmp_path / "clips"), SPEC, ComposeConfig(events=(1, 0, 0), loudness=1.0))
    made = [composer.sample(number) for number in range(20)]
    for one in made:
        words = Counter(dict(event.attributes)["loudness"] for event in events_of(one.tree))
        assert words == {"loud": 1, "quiet": 1}
        assert any(operator == "att_swap" for operator, _ in one.negatives)
    assert all(0.02 < loudness(one.audio.numpy(), RATE) < 0.3 for one in made)
    assert len({one.captions[0].index("loud") < one.captions[0].index("quiet") for one in made}) == 2


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"events": (0, 0, 0)}, "expected weights"),
        ({"events": (1, -1, 1)}, "expected weights"),
        ({"loudness": 1.5}, "share from 0 to 1"),
        ({"captions": 0}, "captions=0"),
        ({"negatives": -1}, "negatives=-1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, why):
    with pytest.raises(ConfigError, match=why):
        ComposeConfig(**fields)


def test_too_few_labels_are_told_with_what_was_left_out(tmp_path):
    samples = [clip_sample("0", {"label": "dog"}), clip_sample("1", {}), clip_sample("2", {"label": "hen"})]
    clips = collect(samples, tmp_path / "clips")
    with pytest.raises(ConfigError, match=r"2 different labels are too few for sounds of 4.*1 left out: no name"):
        Composer(clips, SPEC)


OPTIONS = ShardOptions(count=11, samples_per_shard=4, sample_rate=RATE, seconds=2.0, seed=5)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_shards_hold_sounds_captions_and_what_training_reads(tmp_path):
    write_shards(TEN, tmp_path / "clips", 3)
    told: list[tuple[int, int]] = []
    manifest = compose_shards(
        [ClipSource(shards=str(tmp_path / "clips"))],
        tmp_path / "out",
        OPTIONS,
        progress=lambda done, total: told.append((done, total)),
    )
    assert manifest["counts"]["samples"] == 11
    assert told[0] == (0, 11)
    assert told[-1] == (11, 11)
    assert check_source(str(tmp_path / "out"), SPEC).problems == 0
    seen = 0
    for shard in expand_shards(str(tmp_path / "out")):
        for entry in scan_shard(shard).samples:
            members = read_sample(Blobs(), shard, entry)
            facts = decode_facts(members["json"])
            assert facts.keys() == {"captions", "positives", "negatives", "tree", "sources"}
            assert facts["captions"][0] == members["txt"].decode()
            assert all(read_caption(negative["caption"]) for negative in facts["negatives"])
            wave, rate = soundfile.read(io.BytesIO(members["flac"]))
            assert (len(wave), rate) == (2 * RATE, RATE)
            seen += 1
    assert seen == 11


def test_shards_are_the_same_bytes_from_any_parts_and_workers(tmp_path):
    write_shards(TEN, tmp_path / "clips", 3)
    sources = [ClipSource(shards=str(tmp_path / "clips"))]
    compose_shards(sources, tmp_path / "whole", OPTIONS)
    assert compose_shards(sources, tmp_path / "parts", OPTIONS, part=(2, 2)) == {"parts_missing": 2}
    compose_shards(sources, tmp_path / "parts", OPTIONS, part=(1, 2), workers=2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_build_does_not_go_on_with_other_clips_or_arguments(tmp_path):
    write_shards(TEN, tmp_path / "clips", 3)
    sources = [ClipSource(shards=str(tmp_path / "clips"))]
    compose_shards(sources, tmp_path / "out", OPTIONS)
    with pytest.raises(ConfigError, match="compose was"):
        compose_shards(sources, tmp_path / "out", OPTIONS, config=ComposeConfig(negatives=1))
    (tmp_path / "clips" / "000003.tar").unlink()
    with pytest.raises(ConfigError, match="fingerprints was"):
        compose_shards(sources, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("fields", [{"count": 0}, {"sample_rate": 100}, {"seconds": 0.1}, {"seed": -1}])
def test_options_that_make_no_sense_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ShardOptions(**{"count": 1, **fields})


def test_the_single_sounds_of_the_world_are_composed(tmp_path):
    build_world(
        WorldConfig(clip_seconds=1.0, sample_rate=RATE), tmp_path / "world", samples=120, seed=0, test_samples=1
    )
    source = ClipSource(
        shards=str(tmp_path / "world/train/audio_text"),
        label=("sound.events.timbre",),
        attributes={"loudness": "sound.events.loudness", "pitch": "sound.events.pitch"},
    )
    clips = Clips()
    clips.add(build_index(source.shards, tmp_path / "index"), source)
    assert len(clips) > 10
    assert sum(clips.left_out.values()) > 5
    made = Composer(clips, SPEC, ComposeConfig(events=(1, 0, 0))).sample(0)
    assert all(len(event.attributes) == 2 for event in events_of(made.tree))
