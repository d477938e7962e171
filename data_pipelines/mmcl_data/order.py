"""Which sample stands where: a pure function of seed, source, epoch and place, that needs no memory and no history.

    n samples = slices of `slice_size` neighbours, shuffled = an epoch, cut into `lanes` of n // lanes places each
    a lane    = windows of `window` places, each shuffled = what it gives, one place after another, epoch after epoch

A slice lies together on disk, so that it can be read at once; a window mixes slices; lanes are what ranks share, so
that each reads slices of its own. With `slice_size` 1 an epoch is shuffled sample by sample and windows add nothing.

Both shuffles are permutations that are computed place by place (a Feistel network over the next power of four, walked
until it lands inside: Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9). So the order of an epoch of two
billion samples is there at once, and where a run goes on costs nothing to find. Nothing comes from a library's random
numbers, whose streams may change with its version.

An epoch visits `lanes * (n // lanes)` samples, each once; the n mod lanes others wait for a later one, in which others
wait. Lanes go on into the next epoch in the middle of a batch: nothing is padded or dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from mmcl.errors import ConfigError

VERSION = 2
"""Of everything here: a run resumes only under the version it started with."""

_ROUNDS = 6
_ODDS = [2 * number + 1 for number in range(_ROUNDS)]
_ODD = np.array(_ODDS, dtype=np.uint64)
_FEW = 4
"""Up to here Python's numbers are quicker than arrays."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_SHIFTS = [np.uint64(bits) for bits in (30, 27, 31)]
_FACTORS = [np.uint64(factor) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)]
Places = Int64[np.ndarray, " n"]
Words = UInt64[np.ndarray, " n"]


def mix(*numbers: int) -> int:
    """64 bits that follow from some numbers; SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195."""
    state = 0
    for number in numbers:
        state = _scramble((state ^ (number & _MASK)) + _GOLDEN & _MASK)
    return state


def mix_many(seed: int, *numbers: Places) -> Words:
    """`mix(seed, a, b, ...)` for many a, b, ..."""
    state = np.full(len(numbers[0]), _scramble((seed & _MASK) + _GOLDEN & _MASK), dtype=np.uint64)
    for column in numbers:
        state = _scramble_many((state ^ column.astype(np.uint64)) + np.uint64(_GOLDEN))
    return state


def uniform(seed: int, count: int) -> list[float]:
    """Numbers in [0, 1) that follow from `seed`."""
    return [(mix(seed, number) >> 11) / (1 << 53) for number in range(count)]


def permuted(sizes: Places, seeds: Words, places: Places) -> Places:
    """Where shuffles put what lies at `places`, each in [0, size): that of `size` things and of its own seed."""
    if len(places) <= _FEW:
        each = zip(sizes.tolist(), seeds.tolist(), places.tolist(), strict=True)
        return np.array([_walk(size, seed, place, _forwards) for size, seed, place in each], dtype=np.int64)
    half = _half_bits(sizes)
    found = _network(places.astype(np.uint64), half, seeds)
    outside = np.flatnonzero(found >= sizes.astype(np.uint64))
    while len(outside) > _FEW:
        found[outside] = _network(found[outside], half[outside], seeds[outside])
        outside = outside[found[outside] >= sizes[outside].astype(np.uint64)]
    for number in outside.tolist():
        found[number] = _walk(int(sizes[number]), int(seeds[number]), int(found[number]), _forwards)
    return found.astype(np.int64)


def permuted_list(size: int, seed: int) -> list[int]:
    """The numbers below `size`, shuffled."""
    return [_walk(size, seed, place, _forwards) for place in range(size)]


def place_of(size: int, seed: int, value: int) -> int:
    """The place that a shuffle puts at `value`: its inverse."""
    return _walk(size, seed, value, _backwards)


def _half_bits(sizes: Places) -> Words:
    """Half of the bits of the smallest power of four that is no smaller; 1 at least."""
    bits = np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1]
    return ((bits + 1) // 2).astype(np.uint64)


def _network(values: Words, half: Words, seeds: Words) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in seeds * _ODD[:, None]:
        left, right = right, left ^ (_scramble_many(right + key) & mask)
    return left << half | right


def _walk(size: int, seed: int, value: int, network: Callable[[int, int, int], int]) -> int:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    value = network(value, half, seed)
    while value >= size:
        value = network(value, half, seed)
    return value


def _forwards(value: int, half: int, seed: int) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for odd in _ODDS:
        left, right = right, left ^ (_scramble(right + seed * odd & _MASK) & mask)
    return left << half | right


def _backwards(value: int, half: int, seed: int) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for odd in reversed(_ODDS):
        left, right = right ^ (_scramble(left + seed * odd & _MASK) & mask), left
    return left << half | right


def _scramble(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _scramble_many(values: Words) -> Words:
    values = (values ^ values >> _SHIFTS[0]) * _FACTORS[0]
    values = (values ^ values >> _SHIFTS[1]) * _FACTORS[1]
    return values ^ values >> _SHIFTS[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The order of the samples of one source."""

    samples: int
    """n."""
    lanes: int
    seed: int
    """Of the run."""
    source: int
    """Number of the source, so that two of one size do not go alike."""
    slice_size: int = 1
    window: int = 4096

    def __post_init__(self) -> None:
        if self.samples < self.lanes:
            raise ConfigError(
                f"{self.samples} samples are fewer than data.lanes={self.lanes}: set data.lanes to a divisor of the "
                f"batch size that is no larger, such as 1"
            )

    @property
    def lane_length(self) -> int:
        """Places of a lane in an epoch."""
        return self.samples // self.lanes

    def at(self, lanes: Places, places: Places) -> tuple[Places, Places]:
        """Sample and epoch at places of the endless rows of lanes; any number at once."""
        epochs, places = np.divmod(places, self.lane_length)
        if self.slice_size > 1:
            places = self._in_windows(epochs, lanes, places)
        return self._of_epochs(epochs, lanes * self.lane_length + places), epochs

    def _in_windows(self, epochs: Places, lanes: Places, places: Places) -> Places:
        """Places of lanes, once their windows are shuffled."""
        number, within = np.divmod(places, self.window)
        sizes = np.minimum(self.window, self.lane_length - number * self.window)
        return number * self.window + permuted(sizes, self._seeds(1, epochs, lanes, number), within)

    def _of_epochs(self, epochs: Places, places: Places) -> Places:
        """Samples at places of epochs. The slice at the end of the data is short, wherever a shuffle puts it."""
        seeds = self._seeds(0, epochs)
        slices, short = -(-self.samples // self.slice_size), self.samples % self.slice_size
        if short:
            of_epoch = {int(seed): place_of(slices, int(seed), slices - 1) for seed in np.unique(seeds)}
            ends = np.array([of_epoch[seed] for seed in seeds.tolist()]) * self.slice_size + short
            places = places + np.where(places >= ends, self.slice_size - short, 0)
        number, within = np.divmod(places, self.slice_size)
        return permuted(np.full_like(number, slices), seeds, number) * self.slice_size + within

    def _seeds(self, what: int, *numbers: Places) -> Words:
        return mix_many(mix(VERSION, self.seed, self.source, what), *numbers)
