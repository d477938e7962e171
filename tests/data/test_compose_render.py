"""Composed sound: what the tree says is before is heard before, and what is at once is heard throughout."""

import numpy as np
import pytest
from compose_cases import RATE, TREES, tone
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.errors import DataError
from mmcl_data.compose.render import FADE_S, LOUDNESS, PEAK, loudness, render_audio, trimmed
from mmcl_data.compose.tree import Event, Mix, Seq, Tree

HZ = {"a": 400.0, "b": 800.0, "c": 1300.0, "d": 2100.0}
A, B, C, D = (Event(name, clip=name) for name in HZ)
FADE = round(FADE_S * RATE)


def clips(seconds: float = 1.0, level: float = 0.3, **others: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tone(hz, seconds, level) for name, hz in HZ.items()} | others


def level_of(wave: np.ndarray, name: str) -> float:
    """Root mean square of what the wave holds of a tone."""
    turning = np.exp(-2j * np.pi * HZ[name] * np.arange(len(wave)) / RATE)
    return float(abs(2 * (wave * turning).mean()) / 2**0.5)


def heard(wave: np.ndarray, start: float, end: float) -> set[str]:
    """The tones between two seconds."""
    part = wave[round(start * RATE) : round(end * RATE)]
    return {name for name in HZ if level_of(part, name) > 0.5 * LOUDNESS}


def decibels(value: float) -> float:
    return 20 * float(np.log10(value / LOUDNESS))


def test_a_sequence_is_heard_in_its_order_and_then_nothing():
    wave = render_audio(Seq((A, B)), clips(), RATE, 4 * RATE)
    assert heard(wave, 0.1, 0.9) == {"a"}
    assert heard(wave, 1.05, 1.85) == {"b"}
    assert not wave[2 * RATE - FADE :].any()
    assert len(wave) == 4 * RATE
    assert wave.dtype == np.float32


def test_an_overlay_is_heard_all_the_time():
    wave = render_audio(Mix((A, B, C)), clips(), RATE, 2 * RATE)
    for start in (0.06, 0.3, 0.5, 0.75):
        assert heard(wave, start, start + 0.2) == {"a", "b", "c"}
    assert not heard(wave, 1, 2)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (Seq((A, Mix((B, C)))), ["a", "bc"]),
        (Seq((Mix((B, C)), A)), ["bc", "a"]),
        (Mix((C, Seq((B, A)))), ["bc", "ac"]),
        (Mix((Seq((A, B)), C, D)), ["acd", "bcd"]),
        (Seq((A, B, C, D)), ["a", "b", "c", "d"]),
        (Seq((D, Seq((C, B)), A)), ["d", "c", "b", "a"]),
    ],
)
def test_a_tree_is_heard_as_it_is_written(tree, expected):
    wave = render_audio(tree, clips(4.0), RATE, 8 * RATE)
    share = 8.0 / len(expected)
    for number, names in enumerate(expected):
        assert heard(wave, share * number + 0.2, share * (number + 1) - 0.2) == set(names)


def test_long_recordings_are_cut_so_that_each_has_its_share():
    wave = render_audio(Seq((A, B, C)), clips(10.0), RATE, 3 * RATE)
    assert [heard(wave, second + 0.1, second + 0.9) for second in range(3)] == [{"a"}, {"b"}, {"c"}]


def test_a_short_recording_is_repeated_beside_a_longer_one():
    wave = render_audio(Mix((A, B)), clips(b=tone(HZ["b"], 0.3)), RATE, 2 * RATE)
    assert all(heard(wave, start, start + 0.1) == {"a", "b"} for start in (0.1, 0.4, 0.65, 0.8))


@pytest.mark.parametrize("level", [0.9, 0.3, 0.01])
def test_parts_are_equally_loud_within_a_decibel_whatever_their_recordings(level):
    wave = render_audio(Mix((A, B)), clips(a=tone(HZ["a"], 1.0, level)), RATE, RATE)[2 * FADE : -2 * FADE]
    assert abs(decibels(level_of(wave, "a"))) < 1
    assert abs(decibels(level_of(wave, "b"))) < 1


def test_loudness_is_that_of_what_is_heard_and_not_of_the_pauses():
    pauses = np.concatenate([tone(HZ["a"], 0.2), np.zeros(RATE, dtype=np.float32), tone(HZ["a"], 0.2)])
    wave = render_audio(Seq((A, B)), clips(a=pauses), RATE, 4 * RATE)
    assert abs(decibels(loudness(wave[: round(1.35 * RATE)], RATE))) < 1
    assert abs(decibels(loudness(wave[round(1.5 * RATE) : 2 * RATE], RATE))) < 1


def test_loud_and_quiet_events_are_twelve_decibels_apart():
    loud, quiet = Event("a", (("loudness", "loud"),), "a"), Event("b", (("loudness", "quiet"),), "b")
    wave = render_audio(Mix((loud, quiet)), clips(), RATE, RATE)[2 * FADE : -2 * FADE]
    assert decibels(level_of(wave, "a")) == pytest.approx(6, abs=0.5)
    assert decibels(level_of(wave, "b")) == pytest.approx(-6, abs=0.5)


def test_a_join_has_no_click():
    """No step is larger than both sounds at once make; a hard cut of these would be twenty times that."""
    rumble = {"a": tone(30.25, 1.0), "b": tone(41.0, 1.0, 0.3)[20:]}
    apart = [render_audio(event, rumble, RATE, RATE)[2 * FADE : -2 * FADE] for event in (A, B)]
    steps = sum(float(np.abs(np.diff(wave)).max()) for wave in apart)
    for tree in (A, Seq((A, B)), Seq((B, A)), Seq((A, Event("c", clip="a"), B))):
        wave = render_audio(tree, rumble, RATE, 3 * RATE)
        assert float(np.abs(np.diff(wave, prepend=0, append=0)).max()) < steps
    assert float(np.abs(apart[0]).max()) > 10 * steps


def test_a_sound_that_breaks_off_before_silence_is_faded():
    broken = np.concatenate([np.full(RATE // 2, 0.3, dtype=np.float32), np.zeros(RATE // 2, dtype=np.float32)])
    wave = render_audio(A, {"a": broken}, RATE, RATE)
    assert float(np.abs(np.diff(wave)).max()) < 0.01


def test_power_is_kept_where_unlike_sounds_join():
    random = np.random.default_rng(0)
    noise = {name: random.standard_normal(RATE).astype(np.float32) * 0.1 for name in "ab"}
    wave = render_audio(Seq((A, B)), noise, RATE, 2 * RATE)
    join = wave[RATE - FADE : RATE]
    assert abs(decibels(float(np.sqrt((join**2).mean())))) < 1.5


def test_silence_at_the_ends_of_a_recording_is_left_out():
    silence = np.zeros(RATE, dtype=np.float32)
    padded = np.concatenate([silence, tone(400), silence])
    assert len(trimmed(padded, RATE)) == pytest.approx(RATE // 2 + FADE, abs=0.03 * RATE)
    wave = render_audio(Seq((A, B)), clips(a=padded), RATE, 3 * RATE)
    assert heard(wave, 0.1, 0.45) == {"a"}
    assert heard(wave, 0.6, 1.4) == {"b"}


@pytest.mark.parametrize(
    "wave", [np.zeros(100, np.float32), np.zeros(RATE, np.float32), np.full(99, 1e-30, np.float32)]
)
def test_a_silent_recording_is_refused(wave):
    with pytest.raises(DataError, match="silent"):
        render_audio(Seq((A, B)), clips(a=wave), RATE, RATE)


def test_what_would_peak_is_turned_down_and_keeps_its_balance():
    click = np.zeros(RATE, dtype=np.float32)
    click[::800] = 1.0
    wave = render_audio(Mix((A, B)), clips(a=click), RATE, RATE)
    assert np.abs(wave).max() == pytest.approx(PEAK)
    alone = render_audio(A, clips(a=click), RATE, RATE)
    assert np.abs(alone).max() == pytest.approx(PEAK)


def _recordings(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(40, RATE, 12)
    return {str(n): random.uniform(-0.9, 0.9, length).astype(np.float32) for n, length in enumerate(lengths)}


def _numbered(tree: Tree, left: list[str]) -> Tree:
    if isinstance(tree, Event):
        return Event(tree.label, tree.attributes, left.pop())
    return type(tree)(tuple(_numbered(part, left) for part in tree.parts))


@settings(max_examples=60)
@given(TREES, st.integers(0, 1000), st.integers(400, RATE))
def test_any_tree_of_any_recordings_has_its_length_stays_in_range_and_is_the_same_again(tree, seed, samples):
    tree = _numbered(tree, [str(n) for n in range(12)])
    recordings = _recordings(seed)
    kept = {name: wave.copy() for name, wave in recordings.items()}
    wave = render_audio(tree, recordings, RATE, samples)
    assert wave.shape == (samples,)
    assert np.isfinite(wave).all()
    assert 0 < np.abs(wave).max() <= PEAK * 1.0001
    assert wave.tobytes() == render_audio(tree, recordings, RATE, samples).tobytes()
    assert all(np.array_equal(kept[name], recordings[name]) for name in kept)
