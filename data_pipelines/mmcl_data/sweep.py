"""One function over many shards, in processes, with its results in the order of the shards whoever was first.

A decoder that crashes takes its process along. The shards that were in hand are then read again, each by a process of
its own, so that one of them is named and the others are not lost. That needs two workers or more: one is this process.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import TypeVar

from mmcl.errors import ConfigError, DataError
from mmcl_data.blobs import shown
from mmcl_data.processes import end_pool, process_pool

T = TypeVar("T")
Told = Callable[[int, int], None]
"""Is told how many shards are done, and of how many."""


def untold(done: int, total: int) -> None:
    """Tells nobody."""


def over_shards(
    act: Callable[[str], T], paths: Sequence[str], workers: int = 1, told: Told = untold
) -> Iterator[T | DataError]:
    """What `act` gives for each shard, in order; a `DataError` for one that ended its process.

    Args:
        act: a function of a module, or a `partial` of one; what it takes and gives is pickled.
        paths: of the shards.
        workers: processes; one is this process. At most twice as many results as workers are held.
        told: is told after every shard.

    Raises:
        ConfigError: no worker.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers}: at least one is needed")
    workers = min(workers, len(paths))
    results = _in_turn(act, paths) if workers <= 1 else _side_by_side(act, paths, workers)
    for done, result in enumerate(results, 1):
        told(done, len(paths))
        yield result


def _in_turn(act: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    import torch

    for path in paths:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several threads for the tensor of one sample wait for each other
        try:
            result = act(path)
        finally:
            torch.set_num_threads(threads)
        yield result


def _side_by_side(act: Callable[[str], T], paths: Sequence[str], workers: int) -> Iterator[T | DataError]:
    left = iter(paths)
    begun: deque[tuple[str, ProcessPoolExecutor, Future[T]]] = deque()
    pool = _pool(act, workers)
    try:
        for _ in paths:
            for path in islice(left, 2 * workers - len(begun)):
                begun.append((path, pool, _submit(pool, act, path)))
            path, of, future = begun.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                if of is pool:
                    pool = _pool(act, workers)
                yield _alone(act, path)
    finally:
        end_pool(pool)  # at once: nothing may be written any more when whoever asked has given up


def _submit(pool: ProcessPoolExecutor, act: Callable[[str], T], path: str) -> Future[T]:
    try:
        return pool.submit(act, path)
    except BrokenProcessPool as error:  # by a shard that was begun earlier, which is mended when its turn comes
        broken: Future[T] = Future()
        broken.set_exception(error)
        return broken


def _alone(act: Callable[[str], T], path: str) -> T | DataError:
    with _pool(act, 1) as pool:
        try:
            return pool.submit(act, path).result()
        except BrokenProcessPool:
            return DataError(f"{shown(path)}: a process that reads it ends: a decoder crashes, or memory runs out")


def _pool(act: Callable[[str], T], workers: int) -> ProcessPoolExecutor:
    return process_pool(workers, [(act.func if isinstance(act, partial) else act).__module__])
