"""Shards are read side by side, with results in their order, and one that ends its process is named."""

import os
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from mmcl.errors import ConfigError, DataError, ShardDamaged
from mmcl_data.sweep import over_shards

PATHS = [f"{number}.tar" for number in range(9)]


def length(path: str) -> int:
    time.sleep(0.02 * (path == "0.tar"))  # the first is the last to be done
    return len(path)


def crash(bad: str, path: str) -> str:
    if path == bad:
        os._exit(11)
    return path


def crash_when(flag: Path, path: str) -> str:
    while path == "1.tar" and not flag.exists():
        time.sleep(0.01)
    return crash("1.tar", path)


def fail(path: str) -> str:
    raise ShardDamaged(path, 7, "bad")


@pytest.mark.parametrize("workers", [1, 3, 100])
def test_results_come_in_the_order_of_the_shards(workers):
    paths = [*PATHS, "longer.tar"]
    assert list(over_shards(length, paths, workers)) == [5] * 9 + [10]
    assert list(over_shards(length, [], workers)) == []


@pytest.mark.parametrize("bad", ["0.tar", "4.tar", "8.tar"])
def test_a_shard_that_ends_its_process_costs_itself_only(bad):
    found = list(over_shards(partial(crash, bad), PATHS, 2))
    place = PATHS.index(bad)
    assert isinstance(found[place], DataError) and str(found[place]).startswith(f"{bad}: a process that reads it ends")
    assert [one for number, one in enumerate(found) if number != place] == [path for path in PATHS if path != bad]


def test_shards_that_come_after_a_crash_are_begun_by_new_processes(tmp_path):
    found = over_shards(partial(crash_when, tmp_path / "flag"), PATHS, 2)
    assert next(found) == "0.tar"
    (tmp_path / "flag").touch()
    until = time.monotonic() + 60
    while active_children() and time.monotonic() < until:  # the pool knows that it is broken then
        time.sleep(0.01)
    error, *rest = found
    assert isinstance(error, DataError) and rest == PATHS[2:]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_is_raised(workers):
    with pytest.raises(ShardDamaged, match=r"0\.tar: damaged at byte 7: bad"):
        list(over_shards(fail, PATHS, workers))


def test_no_worker_is_refused():
    with pytest.raises(ConfigError, match="workers=0"):
        list(over_shards(length, PATHS, 0))
