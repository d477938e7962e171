"""One rank of a run: `python -m mmcl_launch.worker RUN_DIRECTORY`, started by a launcher that sets its place."""

import logging
import os
import sys
import traceback
from pathlib import Path

from mmcl.dist import free_port
from mmcl.errors import MmclError
from mmcl.metrics import console
from mmcl_launch.config import RunConfig
from mmcl_launch.ranks import Place, place_from
from mmcl_launch.run import run_rank, saved_config


def train_rank(config: RunConfig, folder: Path, place: Place) -> int:
    """Train on this rank, saying what happens on the terminal and in log.txt; returns the exit status."""
    try:
        run_rank(config, folder, place)
    except MmclError as error:
        logging.getLogger("mmcl").error("%s: %s", type(error).__name__, error)  # the terminal, and log.txt
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> None:
    """End the process at once: peers may be gone, and the interpreter's own clean-up would wait for their sockets."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> int:
    """The rank that the environment describes, of the run in `folder`; returns the exit status."""
    console(sys.stderr)
    try:
        config, place = saved_config(folder), place_from(os.environ) or Place(port=free_port())
    except MmclError as error:
        print(f"mmcl: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return train_rank(config, folder, place)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
