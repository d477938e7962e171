"""Which items go to which shard, decided before anything of them is read, and known again after a kill.

The items are written to a file as they are read, a line each, and only where each line begins is held in memory: eight
bytes an item, and its key. The fingerprint of all lines and of the arguments is what a build is recognised by.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError, DataError
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Elsewhere, Item, Read, Skipped

FORMAT = 1
"""Of what is written for a plan. A change of the bytes raises it."""
_ENOUGH = 100
"""First items that, if all are elsewhere, speak for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a corpus is cut into shards."""

    samples_per_shard: int = 1000
    """samples that are planned for a shard"""
    max_shard_mb: int = 1024
    """megabytes (2^20 bytes) above which a shard is cut in two; a single sample may be larger"""
    seed: int = 0
    """of the order of the samples in the shards"""

    def __post_init__(self) -> None:
        for name, least in (("samples_per_shard", 1), ("max_shard_mb", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value} is too few: at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be built."""

    folder: Path
    """Holds `items`, their lines, and `order`, where the line of each begins."""
    items: int
    samples_per_shard: int
    skipped: list[Skipped]
    """What was left out already."""
    fingerprint: str

    @property
    def shards(self) -> int:
        """How many, of which one may become several if it is too large."""
        return -(-self.items // self.samples_per_shard)

    def items_of(self, shard: int) -> int:
        """How many items go to a shard."""
        return min(self.samples_per_shard, self.items - shard * self.samples_per_shard)


def make_plan(corpus: Corpus, root: Path, folder: Path, options: Options, arguments: Mapping[str, Any]) -> Plan:
    """Read all items of `corpus` into `folder` and put them in an order drawn from the seed.

    `arguments` are all that the build depends on beside the items.

    Raises:
        ConfigError, DataError: as the corpus says.
        DataError: of a hundred items at its beginning every one has a file that is none below `root`.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, arguments], sort_keys=True).encode())
    places, keys, skipped, end = array("Q"), set[str](), list[Skipped](), 0
    with (folder / "items").open("wb") as file:
        for found in _unless_elsewhere(corpus.read(root)):
            item = found
            if isinstance(found, Item) and found.key in keys:
                item = Skipped(found.key, f"a second sample of this key: {', '.join(found.files)}")
            line = ((item.dump() if isinstance(item, Item) else json.dumps(item)) + "\n").encode()
            digest.update(line)
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            keys.add(item.key)
            places.append(end)
            end += file.write(line)
    random.Random(options.seed).shuffle(places)
    with (folder / "order").open("wb") as file:
        places.tofile(file)
    return Plan(
        folder=folder,
        items=len(places),
        samples_per_shard=options.samples_per_shard,
        skipped=skipped,
        fingerprint=digest.hexdigest(),
    )


def _unless_elsewhere(found: Read) -> Read:
    first = list(islice(found, _ENOUGH))
    elsewhere = [one for one in first if isinstance(one, Elsewhere)]
    if len(elsewhere) == _ENOUGH:
        raise DataError(f"{elsewhere[0].where}: {elsewhere[0].why}. So it is with all of the first {_ENOUGH}")
    return chain(first, found)


def read_items(plan: Plan, shard: int) -> list[Item]:
    """The items of one shard."""
    places = array("Q")
    with (plan.folder / "order").open("rb") as file:
        file.seek(shard * plan.samples_per_shard * places.itemsize)
        places.fromfile(file, plan.items_of(shard))
    found = []
    with (plan.folder / "items").open("rb") as file:
        for place in places:
            file.seek(place)
            found.append(Item.load(file.readline()))
    return found
