"""What training changes of whole batches, on their device: colours of images, loudness of sounds, masks in them.

Every row draws from a seed of its own (`Batch.seeds`), so that it looks the same on any number of ranks. Images are
torchvision's operations; the defaults change nothing. Fini et al. 2023, https://arxiv.org/abs/2305.08675, have
`jitter=0.4`, `hue=0.1`, `jitter_chance=0.8`, `gray=0.2`, `blur=0.5` for their strong views.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as images

from mmcl.errors import ConfigError
from mmcl.types import Batch, Modality

_DRAWS = 10
_MOST_MASKS = 8
_GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, as an int64."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changes of images and sounds in training."""

    flip: float = 0.0
    """Chance of an image to be mirrored; where captions tell left from right it makes them wrong."""
    jitter: float = 0.0
    """How far brightness, contrast and saturation go, as a share of what they are."""
    hue: float = 0.0
    """How far colours turn, as a share of the circle, up to 0.5; captions that name colours become wrong."""
    jitter_chance: float = 0.8
    """Chance of an image to get jitter and hue at all."""
    gray: float = 0.0
    """Chance of an image to lose its colours."""
    blur: float = 0.0
    """Chance of an image to be blurred, with a sigma between 0.1 and 2 pixels."""
    gain_db: float = 0.0
    """Sounds become louder or softer by up to so many decibels; what passes full scale is clipped."""

    bands: int = 0
    """Bands of pitches that each sound loses (SpecAugment)."""
    band: float = 0.1
    """Widest of them, as a share of the mel scale."""
    spans: int = 0
    """Stretches of time that each sound loses (SpecAugment)."""
    span: float = 0.1
    """Longest of them, as a share of the clip."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "jitter_chance", "gray", "blur", "band", "span"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: expected a number from 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"augment.hue={self.hue}: expected a share of the circle, from 0 to 0.5")
        for name in ("bands", "spans"):
            if not 0 <= getattr(self, name) <= _MOST_MASKS:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: expected a count from 0 to {_MOST_MASKS}")
        if not 0 <= self.gain_db < math.inf:
            raise ConfigError(f"augment.gain_db={self.gain_db}: expected decibels, 0 or more")

    @property
    def sounds(self) -> bool:
        """Whether sounds can change."""
        return any((self.gain_db, self.bands, self.spans))

    @property
    def colours(self) -> bool:
        """Whether images can change."""
        return any((self.flip, self.jitter, self.hue, self.gray, self.blur))


def augment(batch: Batch, config: AugmentConfig, sample_rate: int) -> Batch:
    """The batch as training sees it, its sounds at `sample_rate` Hz; the very same where nothing is to change."""
    if not (config.colours or config.sounds):
        return batch
    values: dict[Modality, Tensor] = dict(batch.values)
    if config.colours:
        draws = uniforms(batch.seeds[batch.rows["image"]], 0)
        values["image"] = _images(batch.values["image"], draws, config)
    if config.sounds and len(batch.rows["audio"]):
        seeds = batch.seeds[batch.rows["audio"]]
        values["audio"] = _sounds(batch.values["audio"], seeds, config, sample_rate)
    return replace(batch, values=values)


def _sounds(
    waves: Float[Tensor, "n t"], seeds: Int[Tensor, " n"], config: AugmentConfig, sample_rate: int
) -> Float[Tensor, "n t"]:
    """Masks as in SpecAugment, Park et al. 2019, https://arxiv.org/abs/1904.08779, without its warping of time.

    They are cut out of the sound and not of the spectrogram, so that every tower is trained alike and the sound of a
    sample is the same on any number of ranks.
    """
    length = waves.shape[1]
    if config.bands:
        hertz = torch.fft.rfftfreq(length, 1 / sample_rate, device=waves.device)
        mels = torch.log1p(hertz / 700)
        spectrum = torch.fft.rfft(waves)
        for number in range(config.bands):
            spectrum = spectrum.masked_fill(_mask(mels / mels[-1], seeds, 2 + number, config.band), 0)
        waves = torch.fft.irfft(spectrum, n=length)
    times = torch.arange(length, device=waves.device) / length
    for number in range(config.spans):
        waves = waves.masked_fill(_mask(times, seeds, 2 + _MOST_MASKS + number, config.span), 0)
    if config.gain_db:
        waves = waves * 10 ** ((2 * uniforms(seeds, 1)[:, :1] - 1) * config.gain_db / 20)
    return waves.clamp(-1, 1)


def _mask(places: Float[Tensor, " k"], seeds: Int[Tensor, " n"], what: int, widest: float) -> Bool[Tensor, "n k"]:
    """Of places in [0, 1], for each row those in an interval of its own."""
    draws = uniforms(seeds, what)
    width = draws[:, :1] * widest
    start = draws[:, 1:2] * (1 - width)
    return (places >= start) & (places < start + width)


def uniforms(seeds: Int[Tensor, " n"], what: int) -> Float[Tensor, "n k"]:
    """Numbers in [0, 1) that follow from seeds and what they are for, on their device (SplitMix64)."""
    steps = torch.arange(1, _DRAWS + 1, device=seeds.device) + what * _DRAWS
    words = seeds[:, None] + steps * _GOLDEN
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        words = (words ^ _shifted(words, shift)) * factor
    words = words ^ _shifted(words, 31)
    return _shifted(words, 40).float() / (1 << 24)


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _images(
    pixels: UInt8[Tensor, "n 3 h w"], draws: Float[Tensor, "n k"], config: AugmentConfig
) -> UInt8[Tensor, "n 3 h w"]:
    if config.flip:
        mirrored = (draws[:, 0] < config.flip)[:, None, None, None]
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    if not (config.jitter or config.hue or config.gray or config.blur):
        return pixels
    rows = zip(pixels.unbind(), draws[:, 1:].tolist(), strict=True)  # waits for the device
    changed = [_image(image, numbers, config) for image, numbers in rows]
    return torch.stack(changed) if changed else pixels


def _image(image: UInt8[Tensor, "3 h w"], numbers: list[float], config: AugmentConfig) -> UInt8[Tensor, "3 h w"]:
    whether, brightness, contrast, saturation, hue, gray, blur, sigma, _ = numbers
    if whether < config.jitter_chance:
        if config.jitter:
            for change, number in (
                (images.adjust_brightness, brightness),
                (images.adjust_contrast, contrast),
                (images.adjust_saturation, saturation),
            ):
                image = change(image, 1 + (2 * number - 1) * config.jitter)
        if config.hue:
            image = images.adjust_hue(image, (2 * hue - 1) * config.hue)
    if gray < config.gray:
        image = images.rgb_to_grayscale(image, num_output_channels=3)
    if blur < config.blur:
        size = max(3, image.shape[-1] // 20 * 2 + 1)
        image = images.gaussian_blur(image, [size, size], [0.1 + 1.9 * sigma])
    return image
