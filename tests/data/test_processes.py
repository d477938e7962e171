"""Processes that work for another end with it, hear no signals that are for it, and leave nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from data_cases import digest, gone, sample, stream, take, write

BEGIN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])

if __name__ == "__main__":
"""
STREAMS = """
    from data_cases import digest, stream
    batches = stream({"a": sys.argv[2]}, data={"workers": 2, "ahead": 1}).batches()
    print(digest(next(batches)), flush=True)
    for _ in sys.stdin:
        print(digest(next(batches)), flush=True)
    batches.close()
"""
FAILS = """
    from data_cases import Trap, stream, take
    from mmcl_data.samples import DecodeConfig
    second = take(stream({"a": sys.argv[2]}), 2)[1]
    hang = tuple(f"number {int(key.split('#')[1])}" for key in second.keys)
    decode = DecodeConfig(words=Trap(hang=hang, begun=sys.argv[3]))

    def consume():
        batches = stream({"a": sys.argv[2]}, data={"workers": 2, "decode": decode}).batches()
        next(batches)
        while not os.path.exists(sys.argv[3]):
            time.sleep(0.02)
        print("hangs", flush=True)
        sys.stdin.readline()
        raise RuntimeError("nobody catches this")

    consume()
"""
WAITS = """
    from mmcl_data.processes import process_pool
    pool = process_pool(2, [])
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 1000).result()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("shards") / "s", [sample(n) for n in range(32)])


@contextmanager
def begin(folder: Path, program: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a program; it is killed at the end if it is still there."""
    script = folder / "program.py"
    script.write_text(BEGIN + program)
    command = [sys.executable, str(script), str(Path(__file__).parent), *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def below(process: int) -> set[int]:
    """What a process started, and what that started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, state = entry.parent.name, entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state[0] != "Z":
            parents[int(name)] = int(state[1])
    found, more = set[int](), {process}
    while more := {child for child, parent in parents.items() if parent in more} - found:
        found |= more
    return found


def semaphores_of(process: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"sem.mmcl-*-{process}-*"))


def test_signals_to_a_whole_step_end_no_worker(shards, tmp_path):
    expected = [digest(batch) for batch in take(stream({"a": shards}), 6)]
    with begin(tmp_path, STREAMS, shards) as parent:
        assert parent.stdin and parent.stdout and parent.stderr
        found = [parent.stdout.readline().strip()]
        started = below(parent.pid)
        assert len(started) == 4  # a resource tracker, a fork server, two workers
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT):
            for process in started:
                os.kill(process, number)
            parent.stdin.write("\n")
            parent.stdin.flush()
            found.append(parent.stdout.readline().strip())
        assert below(parent.pid) == started
        _, told = parent.communicate()
    assert found == expected
    assert parent.returncode == 0 and told == ""
    assert gone(started)


def test_an_error_that_nobody_catches_ends_the_process_though_a_decoder_never_does(shards, tmp_path):
    with begin(tmp_path, FAILS, shards, str(tmp_path / "busy")) as parent:
        assert parent.stdout and parent.stdout.readline() == "hangs\n"
        started = below(parent.pid)
        _, told = parent.communicate(timeout=20)
    assert parent.returncode == 1 and "nobody catches this" in told
    assert len(started) == 4 and gone(started)


def test_a_process_that_is_killed_again_and_again_leaves_nothing_behind(tmp_path):
    for _ in range(20):
        with begin(tmp_path, WAITS) as parent:
            assert parent.stdout and parent.stdout.readline()
            started = below(parent.pid)
            assert semaphores_of(parent.pid)
            parent.kill()
        assert gone(started)
        assert semaphores_of(parent.pid) == []


def test_what_was_killed_with_all_it_had_started_is_tidied_up_by_the_next(tmp_path):
    with begin(tmp_path, WAITS) as parent:
        assert parent.stdout and parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGKILL)
    assert semaphores_of(parent.pid)
    with begin(tmp_path, WAITS) as following:
        assert following.stdout and following.stdout.readline()
        assert semaphores_of(parent.pid) == [] and semaphores_of(following.pid)
