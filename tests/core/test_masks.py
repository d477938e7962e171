"""Sounds lose bands and spans by the seed of their sample, as SpecAugment's spectrograms do."""

import math

import pytest
import torch

from mmcl.augment import AugmentConfig, augment
from mmcl.errors import ConfigError
from mmcl.testing import fake_batch, tiny_config
from mmcl.types import Batch

RATE = 16_000


def sounds(rows: int, seconds: float = 0.5) -> Batch:
    """White noise in all rows."""
    batch = fake_batch(tiny_config(), {name: [True] * rows for name in ("image", "text", "audio")}, seed=0)
    noise = torch.rand(rows, round(RATE * seconds), generator=torch.Generator().manual_seed(1)) - 0.5
    batch.values["audio"] = noise
    batch.seeds[:] = torch.arange(rows) * 1000 + 7
    return batch


def masked(batch: Batch, **config: float) -> torch.Tensor:
    return augment(batch, AugmentConfig(**config), RATE).values["audio"]


def quiet_runs(row: torch.Tensor) -> list[int]:
    """Lengths of the runs of zeros that are no chance."""
    changes = torch.diff(
        (row == 0).int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    starts, ends = (changes == 1).nonzero()[:, 0], (changes == -1).nonzero()[:, 0]
    return [length for length in (ends - starts).tolist() if length > 2]


def test_each_sound_loses_spans_of_its_own_that_are_no_longer_than_allowed():
    batch = sounds(200)
    found = masked(batch, spans=1, span=0.2)
    lengths = [sum(quiet_runs(row)) for row in found]
    assert max(lengths) <= 0.2 * 8000 + 1
    assert sum(lengths) / len(lengths) == pytest.approx(0.1 * 8000, rel=0.15)  # uniform up to the longest
    assert len(set(lengths)) > 150
    kept = found != 0
    torch.testing.assert_close(found[kept], batch.values["audio"][kept])


def test_each_sound_loses_bands_of_its_own_on_the_mel_scale():
    batch = sounds(200)
    before, after = (torch.fft.rfft(wave).abs() for wave in (batch.values["audio"], masked(batch, bands=1, band=0.3)))
    gone = after < 1e-3 * before
    mels = torch.log1p(torch.fft.rfftfreq(8000, 1 / RATE) / 700) / math.log1p(8000 / 700)
    widths = []
    for row in gone:
        places = row.nonzero()[:, 0]
        if len(places):
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1)), "one band"
            widths.append(float(mels[places[-1]] - mels[places[0]]))
    assert max(widths) <= 0.3
    assert sum(widths) / 200 == pytest.approx(0.15, rel=0.15)
    torch.testing.assert_close(after[~gone], before[~gone], rtol=1e-3, atol=1e-3)


def test_a_sound_is_masked_alike_in_any_company():
    batch = sounds(6)
    config = {"bands": 2, "spans": 2, "gain_db": 6.0}
    whole = masked(batch, **config)
    for row in range(6):
        alone = sounds(6)
        alone.values["audio"], alone.rows["audio"] = alone.values["audio"][[row]], alone.rows["audio"][[row]]
        torch.testing.assert_close(masked(alone, **config)[0], whole[row])


def test_nothing_changes_unless_it_is_asked_for():
    batch = sounds(3)
    assert augment(batch, AugmentConfig(), RATE) is batch


def test_a_batch_without_sounds_is_left_alone():
    batch = sounds(3)
    batch.values["audio"], batch.rows["audio"] = batch.values["audio"][:0], batch.rows["audio"][:0]
    assert masked(batch, bands=1, spans=1).shape == (0, 8000)


@pytest.mark.parametrize("wrong", [{"bands": 9}, {"spans": -1}, {"band": 1.5}, {"span": -0.1}])
def test_masks_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"augment.{next(iter(wrong))}="):
        AugmentConfig(**wrong)
