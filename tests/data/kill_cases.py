"""A run that only reads and notes what it read, for tests that kill it: a life is forked at each line of stdin.

`python kill_cases.py HOME SHARDS OPTIONS`. A life goes on behind the last state of HOME/state.json, appends
`step digest` to HOME/log for every batch, writes the state behind it, and ends at step `STEPS`.
"""

import json
import os
import sys
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import torch
from data_cases import SPEC, digest

from mmcl_data.processes import start_server
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig
from mmcl_data.workers import WORKERS_NEED

STEPS = 60
BATCH = 8


def make(shards: str, options: dict) -> ShardStream:
    sources = {
        "all": SourceConfig(shards=f"{shards}/a", weight=2.0),
        "some": SourceConfig(shards=f"{shards}/b", captions={"title": 1.0, "txt": 1.0}),
    }
    return ShardStream(DataConfig(sources=sources, lanes=2, max_bad_share=1.0, **options), SPEC, BATCH, seed=5)


def live(home: Path, shards: str, options: dict) -> None:
    stream, step = make(shards, options), 0
    if (home / "state.json").exists():
        saved = json.loads((home / "state.json").read_text())
        step = saved["step"]
        stream.load_state_dict(saved["stream"])
    for batch in islice(stream.batches(), STEPS - step):
        step += 1
        with (home / "log").open("a") as log:
            log.write(f"{step} {digest(batch)}\n")
        staged = home / ".state.json"
        staged.write_text(json.dumps({"step": step, "stream": stream.state_dict()}))
        staged.replace(home / "state.json")


def share_server() -> None:
    """Let lives use a fork server of this process: one that imports for each of them takes most of its seconds."""
    start_server(WORKERS_NEED)
    started = forkserver._forkserver
    # a fork looks after the server as if it were its child
    forkserver.ensure_running = started.ensure_running = lambda: None


def main() -> None:
    home, shards, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)  # threads do not survive a fork
    if options.get("worker_kind") == "processes":
        share_server()
    next(make(shards, {}).batches())  # imports, index and tokenizer, once for all lives
    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # with whatever it starts
            live(home, shards, options)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
