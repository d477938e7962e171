"""Lets one input after another loose, each in a fork of a process that has imported everything, and tells what it did.

    python box.py FOLDER      reads names of inputs, a line each, and answers each with a line of JSON

A fork costs milliseconds where imports cost seconds, and its memory is counted from where it began. An audit hook in
the fork sees every act that Python would do for an input: processes, connections, unpickling, and files that are
written outside of the input's own folder.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from hostile import CANARY, CONTROLS, CORPUS, evaluate, good, shard, train, whole

from mmcl.errors import MmclError

INPUTS = CORPUS | CONTROLS
LIMIT_S = 15.0
FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.bind", "ctypes.dlopen"),
)
CHANGING = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


def memory(what: str) -> int:
    """Bytes, as /proc/self/status has them."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def watch(folder: Path, offences: list[str]) -> None:
    """Note in `offences` whatever is done that reading data never has to do."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(str(folder))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            offences.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & writing and not inside(args[0]):
            if args[0] != "/dev/null":
                offences.append(f"writes {args[0]!r}")
        elif event in CHANGING and not inside(args[0]):
            offences.append(f"{event} {args!r:.200}")

    sys.addaudithook(hook)


def try_out(name: str, folder: Path) -> dict[str, Any]:
    """What the input called `name` does."""
    offences: list[str] = []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    watch(folder.resolve(), offences)
    started, error, text, typed = time.perf_counter(), "", "", True
    try:
        INPUTS[name].use(folder)
    except BaseException as raised:
        error, text, typed = type(raised).__name__, str(raised), isinstance(raised, MmclError)
        if not typed:
            text = "".join(traceback.format_exception(raised)[-6:])
    seconds = time.perf_counter() - started
    children = [file.read_text().split() for file in Path("/proc/self/task").glob("*/children")]
    return {
        "error": error,
        "text": text[:4000],
        "typed": typed,
        "seconds": seconds,
        "bytes": memory("VmHWM") - before,
        "offences": offences + [f"child {pid}" for pids in children for pid in pids],
    }


def forked(act: Any) -> Any:
    """What `act` gives in a fork; None where it never ends or the fork does not live to tell."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sending, json.dumps(act()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(sending)
    ready, _, _ = select.select([receiving], [], [], LIMIT_S)
    data = os.read(receiving, 1 << 20) if ready else b""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(receiving)
    return json.loads(data) if data else None


def main(root: Path) -> None:
    torch.set_num_threads(1)  # other threads would not live through a fork
    (root / "good").mkdir()
    shard(root / "good", whole(good()))
    for act in (train, evaluate):  # imports what is imported late
        act(root / "good")
    print(json.dumps("ready"), flush=True)
    for number, line in enumerate(sys.stdin):
        name, folder = json.loads(line), root / str(number)
        folder.mkdir()
        os.chdir(folder)
        forked(lambda name=name, folder=folder: INPUTS[name].make(folder) and None)
        told = forked(lambda name=name, folder=folder: try_out(name, folder))
        canary = any(path.name == CANARY for path in (*root.rglob(CANARY), *Path("/tmp").glob(CANARY)))
        print(json.dumps(told and told | {"canary": canary, "folder": str(folder)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
