"""What training changes of a batch follows from the seed of each row and from nothing else."""

import pytest
import torch

from mmcl.augment import AugmentConfig, augment, uniforms
from mmcl.errors import ConfigError
from mmcl.types import ID_KINDS, Batch

STRONG = AugmentConfig(flip=0.5, jitter=0.4, hue=0.1, gray=0.3, blur=0.5, gain_db=6.0)
ONE_AT_A_TIME = {
    "flip": AugmentConfig(flip=0.5),
    "jitter": AugmentConfig(jitter=0.4),
    "hue": AugmentConfig(hue=0.3),
    "gray": AugmentConfig(gray=0.5),
    "blur": AugmentConfig(blur=0.5),
    "gain": AugmentConfig(gain_db=6.0),
}
RATE = 8000


def batch_of(seeds: list[int], images: list[int] | None = None, sounds: list[int] | None = None) -> Batch:
    """Rows with these seeds, of which some have an image and some a sound; what they hold follows from the seed."""
    rows = {
        "image": torch.tensor(range(len(seeds)) if images is None else images, dtype=torch.long),
        "text": torch.zeros(0, dtype=torch.long),
        "audio": torch.tensor(range(len(seeds)) if sounds is None else sounds, dtype=torch.long),
    }

    def made(row: int) -> torch.Generator:
        return torch.Generator().manual_seed(seeds[row])

    pixels = [torch.randint(0, 256, (3, 24, 24), generator=made(row), dtype=torch.uint8) for row in rows["image"]]
    waves = [torch.rand(400, generator=made(row)) - 0.5 for row in rows["audio"]]
    return Batch(
        size=len(seeds),
        values={
            "image": torch.stack(pixels) if pixels else torch.zeros(0, 3, 24, 24, dtype=torch.uint8),
            "text": torch.zeros(0, 5, dtype=torch.long),
            "audio": torch.stack(waves) if waves else torch.zeros(0, 400),
        },
        rows=rows,
        ids=torch.zeros(len(seeds), len(ID_KINDS), dtype=torch.long),
        seeds=torch.tensor(seeds, dtype=torch.long),
    )


def seeds(count: int) -> list[int]:
    return [(number * 0x9E3779B97F4A7C15) % (1 << 63) for number in range(1, count + 1)]


def test_nothing_is_changed_unless_it_is_asked_for():
    batch = batch_of(seeds(4))
    assert augment(batch, AugmentConfig(), RATE) is batch


@pytest.mark.parametrize("config", [*ONE_AT_A_TIME.values(), STRONG], ids=[*ONE_AT_A_TIME, "all"])
def test_a_row_is_changed_alike_alone_in_company_and_again(config):
    batch = batch_of(seeds(12))
    whole = augment(batch, config, RATE)
    again = augment(batch, config, RATE)
    for name in ("image", "audio"):
        assert torch.equal(whole.values[name], again.values[name])
        for row in range(12):
            alone = augment(batch_of(seeds(12)[row : row + 1]), config, RATE)
            assert torch.equal(alone.values[name][0], whole.values[name][row])
    changed = whole.values["image" if config.colours else "audio"]
    assert not torch.equal(changed, batch.values["image" if config.colours else "audio"])


def test_a_value_is_changed_by_the_seed_of_its_row_and_not_by_its_place():
    ragged = augment(batch_of(seeds(6), images=[1, 4], sounds=[0, 4, 5]), STRONG, RATE)
    whole = augment(batch_of(seeds(6)), STRONG, RATE)
    assert torch.equal(ragged.values["image"], whole.values["image"][[1, 4]])
    assert torch.equal(ragged.values["audio"], whole.values["audio"][[0, 4, 5]])


def test_another_epoch_is_changed_otherwise():
    one, other = batch_of(seeds(8)), batch_of(seeds(16)[8:])
    same = augment(one, STRONG, RATE).values["image"]
    twice = Batch(size=8, values=one.values, rows=one.rows, ids=one.ids, seeds=other.seeds)
    assert sum(torch.equal(a, b) for a, b in zip(same, augment(twice, STRONG, RATE).values["image"], strict=True)) <= 1


@pytest.mark.parametrize("config", [*ONE_AT_A_TIME.values(), STRONG], ids=[*ONE_AT_A_TIME, "all"])
def test_kinds_shapes_and_ranges_stay(config):
    batch = batch_of(seeds(6))
    found = augment(batch, config, RATE)
    assert found.values["image"].dtype == torch.uint8 and found.values["image"].shape == (6, 3, 24, 24)
    assert found.values["audio"].dtype == torch.float32 and found.values["audio"].shape == (6, 400)
    assert found.values["audio"].abs().max() <= 1
    assert found.values["text"] is batch.values["text"] and found.rows is batch.rows and found.seeds is batch.seeds


@pytest.mark.parametrize("config", [STRONG, AugmentConfig(flip=1.0)])
def test_a_batch_without_images_and_sounds_is_no_trouble(config):
    found = augment(batch_of(seeds(3), images=[], sounds=[]), config, RATE)
    assert found.values["image"].shape == (0, 3, 24, 24) and found.values["audio"].shape == (0, 400)


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 1.0])
def test_so_many_images_are_mirrored_and_the_others_are_as_they_were(chance):
    batch = batch_of(seeds(600))
    before, after = batch.values["image"], augment(batch, AugmentConfig(flip=chance), RATE).values["image"]
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(after, before, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(after, before, strict=True)])
    assert (mirrored ^ kept).all()
    assert abs(mirrored.float().mean() - chance) < 0.07


def test_grey_images_have_three_equal_channels():
    found = augment(batch_of(seeds(5)), AugmentConfig(gray=1.0), RATE).values["image"]
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])


def test_sounds_become_louder_and_softer_by_so_many_decibels_and_keep_their_shape():
    batch = batch_of(seeds(200))
    found = augment(batch, AugmentConfig(gain_db=6.0), RATE).values["audio"]
    gains = found.abs().sum(1) / batch.values["audio"].abs().sum(1)
    assert 10 ** (-6.01 / 20) < gains.min() < 0.6 and 1.7 < gains.max() < 10 ** (6.01 / 20)
    quiet = gains < 1
    assert torch.allclose(found[quiet], batch.values["audio"][quiet] * gains[quiet, None], atol=1e-6)


def test_draws_are_uniform_and_do_not_go_together():
    draws = torch.cat([uniforms(torch.tensor(seeds(20_000)), what) for what in (0, 1)], dim=1)
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.allclose(draws.mean(0), torch.full((20,), 0.5), atol=0.01)
    assert torch.allclose(draws.var(0), torch.full((20,), 1 / 12), atol=0.003)
    assert (torch.corrcoef(draws.T) - torch.eye(20)).abs().max() < 0.04
    near = uniforms(torch.arange(20_000), 0)
    assert torch.corrcoef(torch.stack([near[:-1, 0], near[1:, 0]]))[0, 1].abs() < 0.04, "also of neighbours"


@pytest.mark.parametrize(
    "fields", [{"flip": 1.1}, {"jitter": -0.1}, {"hue": 0.6}, {"gray": 2.0}, {"blur": -1.0}, {"gain_db": float("inf")}]
)
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(ConfigError, match=rf"augment.{next(iter(fields))}="):
        AugmentConfig(**fields)
