"""Shards packed side by side, in processes.

`sweep.over_shards` reads a shard again if its process crashed. A shard that is being written is better given up: the
build is started again and goes on with it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from mmcl.errors import ConfigError, DataError
from mmcl_data.build.pack import Job, Report, pack_shard
from mmcl_data.processes import process_pool


def pack_shards(job: Job, shards: Sequence[str], workers: int) -> Iterator[Report]:
    """Pack `shards` of the plan in so many processes, one of which is this one; their reports in order.

    Raises:
        ConfigError: no worker.
        DataError: a shard cannot be written, or its process ended.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers}: at least one is needed")
    if (workers := min(workers, len(shards))) <= 1:
        yield from map(partial(pack_shard, job), shards)
        return
    pool = process_pool(workers, [pack_shard.__module__])
    try:
        yield from pool.map(partial(pack_shard, job), shards)
    except BrokenProcessPool as error:
        raise DataError(
            f"{job.out}: a process that packs ended: memory ran out, or a file crashed its decoder. "
            "The same command goes on; with --workers 1 it ends at the shard that is to blame"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
