"""How sources share what is given out in turns: by their weights, each within one turn of its share at any time."""

import math
from collections.abc import Sequence

import numpy as np

from mmcl.errors import ConfigError
from mmcl_data.order import Places


def next_turns(weights: Sequence[float], given: Sequence[int], count: int) -> list[int]:
    """Of the next `count` turns those of each source, if they were `given` so many before.

    Tijdeman 1980, the chairman assignment problem, https://doi.org/10.1016/0012-365X(80)90269-1: of the sources that
    may have a turn without running ahead, the one has it that would fall behind first. After any number of turns each
    of n sources is then within 1 - 1 / (2n - 2) of its share. How many turns are asked for at once makes no difference.

    Args:
        weights: of the sources; they sum to 1.
        given: turns that each has had.
        count: of turns.
    """
    if len(weights) == 1:
        return [count]
    edge = 1 / (2 * len(weights) - 2)
    now = list(given)
    first = sum(given) + 1
    for turn in range(first, first + count):
        due = [turn * weight - had for weight, had in zip(weights, now, strict=True)]
        ready = [number for number, lacks in enumerate(due) if lacks >= edge]
        late = {number: math.ceil((1 - edge - due[number]) / weights[number]) for number in ready}
        chosen = min(ready, key=lambda number: (late[number], number)) if ready else int(np.argmax(due))
        now[chosen] += 1
    return [after - before for after, before in zip(now, given, strict=True)]


def fixed_turns(weights: Sequence[float], count: int) -> list[int]:
    """`count` turns as near to the weights as whole numbers go, at least one for each source.

    Raises:
        ConfigError: there are more sources than turns, or their weights are too uneven for so few.
    """
    wanted = [weight * count for weight in weights]
    turns = [max(1, math.floor(want)) for want in wanted]
    by_lack = sorted(range(len(wanted)), key=lambda number: (turns[number] - wanted[number], number))
    for number in by_lack[: max(0, count - sum(turns))]:
        turns[number] += 1
    if sum(turns) != count:
        raise ConfigError(
            f"data.policy=fixed: {len(weights)} sources cannot share {count} slots: have fewer data.lanes, a larger "
            "batch or other weights"
        )
    return turns


def interleaved(turns: Sequence[int]) -> Places:
    """Turns as (source, number), those of each source evenly spread, so that parts are like the whole."""
    places = [
        ((2 * number + 1) / (2 * of_source), source, number)
        for source, of_source in enumerate(turns)
        for number in range(of_source)
    ]
    return np.array([(source, number) for _, source, number in sorted(places)], dtype=np.int64).reshape(-1, 2)
