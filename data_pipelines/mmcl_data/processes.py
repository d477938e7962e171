"""Processes that work for this one and end with it, however that ends.

They are begun by a fork server that imported what they need: forking this process would copy its threads half-way, and
starting each from nothing takes seconds.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def process_pool(
    workers: int, needs: Sequence[str], begin: Callable[..., None] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """So many processes, with one thread of torch each.

    Args:
        workers: processes.
        needs: modules to import before they are forked.
        begin: is called with `args` in each of them first.
        args: what `begin` takes.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *needs])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(begin, args))


def _begin(begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one hears it too
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # several threads for the tensor of one sample wait for each other
    Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    """Other workers hold the queue open, so that it does not tell when the process they work for is gone."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
