"""A shard at which a process died, packed once more with every item converted in another process, which may die.

Libraries that rewrite TIFF or AIFF can crash on a file. The item in hand then is converted once more by a new process,
as memory may have run out by no fault of its own; if that dies too, the item is left out with this as its reason.
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mmcl.errors import DataError
from mmcl_data.build.items import Item
from mmcl_data.build.pack import Job, Report, members_of, pack_shard
from mmcl_data.processes import end_pool, process_pool

_ATTEMPTS = 2


def pack_one_by_one(job: Job, number: str) -> Report:
    """As `pack_shard`, to the same bytes, without the items that end their process.

    Raises:
        DataError: as `pack_shard`.
    """
    apart = _Apart(job)
    try:
        return pack_shard(job, number, apart.members)
    finally:
        apart.close()


class _Apart:
    """One process at a time, which converts items."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pool: ProcessPoolExecutor | None = None

    def members(self, item: Item) -> dict[str, bytes]:
        for _ in range(_ATTEMPTS):
            self.pool = self.pool or process_pool(1, [members_of.__module__])
            try:
                return self.pool.submit(members_of, self.job.corpus, self.job.root, item).result()
            except BrokenProcessPool:
                self.close()
        raise DataError("a process that converts it ends: its decoder crashes, or memory runs out")

    def close(self) -> None:
        if self.pool is not None:
            end_pool(self.pool)
            self.pool = None
