"""Processes that work for this one and end with it, however that ends.

They are begun by a fork server that imported what they need: forking this process would copy its threads half-way, and
starting each from nothing takes seconds.

Slurm and shells send signals to every process of a step or group, and what they mean is for the process that trains to
say. So its workers, the fork server and the resource tracker of multiprocessing are deaf to them from their first
moment: they are started while the signals are blocked, which is inherited.
"""

import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import current_process, forkserver, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import WeakSet

DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that workers do not hear; SIGKILL ends them."""
_SEMAPHORES = "mmcl"
"""Begins the names of ours in /dev/shm; number of the space of processes and process follow."""
_JOIN_S = 5.0


class _Worker(ForkServerProcess):
    def terminate(self) -> None:
        """At once: it would not hear SIGTERM, which is what pools send where one of them crashed."""
        self.kill()


class _Context(ForkServerContext):
    Process = _Worker


def process_pool(
    workers: int, needs: Sequence[str], begin: Callable[..., None] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """So many processes, with one thread of torch each. They end with this process, whatever they are at then.

    Args:
        workers: processes.
        needs: modules to import before they are forked.
        begin: is called with `args` in each of them first.
        args: what `begin` takes.
    """
    start_server(needs)
    _forget_the_dead()
    pool = ProcessPoolExecutor(workers, mp_context=_Context(), initializer=_begin, initargs=(begin, args))
    _pools.add(pool)
    return pool


def start_server(needs: Sequence[str]) -> None:
    """Start what forks workers, if it is not there; it imports `needs` meanwhile, which takes seconds."""
    # so that whoever starts next can tell whose they were, should this process be killed with its tracker
    current_process()._config["semprefix"] = f"/{_SEMAPHORES}-{_space()}-{os.getpid()}"  # pyright: ignore
    forkserver.set_forkserver_preload([__name__, *needs])
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)  # each time, as the first unblocks some
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def end_pool(pool: Executor) -> None:
    """End the processes of a pool at once: one may be in a decoder that never returns."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    manager = getattr(pool, "_executor_manager_thread", None)
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(_JOIN_S)
    if manager is not None:
        manager.join(_JOIN_S)  # it closes its pipes


@contextmanager
def spare_memory(more: int) -> Iterator[None]:
    """Let this process have at most so many bytes more meanwhile: what asks for more gets a `MemoryError`.

    Files that are mapped, and memory that is shared, are not counted. Where the system does not say what a process has
    nothing is limited.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        least = min((most for most in before if most != resource.RLIM_INFINITY), default=held + more)
        resource.setrlimit(resource.RLIMIT_DATA, (min(held + more, least), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _begin(begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    for number in DEAF_TO:  # also if somebody else started the fork server
        signal.signal(number, signal.SIG_IGN)
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


_pools: WeakSet[ProcessPoolExecutor] = WeakSet()
os.register_at_fork(after_in_child=_pools.clear)


def _end_all() -> None:
    for pool in list(_pools):
        end_pool(pool)


# Behind an error that nobody caught the interpreter waits for what pools have in hand, while the traceback keeps
# whoever would end them. The last of these hooks runs first, and that of pools came with their import.
threading._register_atexit(_end_all)  # pyright: ignore


def _space() -> int:
    """Of processes, in which their numbers count: containers may share /dev/shm."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def _forget_the_dead() -> None:
    """Remove the semaphores of processes that were killed together with their resource tracker."""
    ours = re.compile(rf"sem\.{_SEMAPHORES}-{_space()}-(\d{{1,9}})-\w+")
    for path in Path("/dev/shm").glob(f"sem.{_SEMAPHORES}-*"):
        if (named := ours.fullmatch(path.name)) and not _is_there(int(named[1])):
            with suppress(OSError):
                path.unlink()


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
