"""Where a process stands among the ranks of a run, and starting the ranks of one machine.

Precedence: torchrun's variables, then Slurm's, then a process alone.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmcl.dist import free_port
from mmcl.errors import ConfigError, RankFailed, Stopped

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"

STOPPING: dict[str, Any] = {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "shutdown_timeout": 60}
"""Of the elastic agent, where torch is new enough: pass these on, and give ranks as many seconds to save and end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process among its peers."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_world: int = 1
    address: str = "127.0.0.1"
    """Of rank 0."""
    port: int = 29500
    launcher: str = "torch"
    """Who started the process: torch or slurm."""


def place_from(environ: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process, None where nobody launched it.

    Raises:
        ConfigError: a variable is missing or no number, or Slurm gave several tasks but srun did not start this one.
    """
    if "RANK" in environ:
        return _place(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _place(
            {"SLURM_NTASKS": "1", **environ},
            "SLURM_PROCID",
            "SLURM_NTASKS",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
        )
    if environ.get("SLURM_NTASKS", "1") != "1":
        raise ConfigError(
            f"SLURM_NTASKS={environ['SLURM_NTASKS']} but srun did not start this process, so every task would be "
            "rank 0: put srun in front of the command, or unset SLURM_NTASKS to run alone"
        )
    return None


def _place(environ: Mapping[str, str], rank: str, world: str, local_rank: str, local_world: str) -> Place:
    if environ.get(world) == "1":  # nobody to meet: an address is welcome and not needed
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environ}
    try:
        return Place(
            rank=int(environ[rank]),
            world=int(environ[world]),
            local_rank=int(environ[local_rank]),
            local_world=int(re.split(r"[(,]", environ.get(local_world, "1"))[0]),  # Slurm writes 8(x3),4
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            launcher="torch" if rank == "RANK" else "slurm",
        )
    except KeyError as error:
        raise ConfigError(
            f"{rank} is set but {error.args[0]} is not: slurm/train.sbatch shows how to set it"
        ) from error
    except ValueError as error:
        names = f"{rank}, {world}, {local_rank}, {local_world} and MASTER_PORT"
        raise ConfigError(f"{names} must be numbers: {error}") from error


def start_ranks(module: str, arguments: Sequence[str], nproc: int) -> None:
    """Run `python -m module arguments` as `nproc` ranks on this machine until all are done.

    torch's elastic agent starts them, sets RANK and its kin, forwards signals, and stops the others when one fails.

    Raises:
        RankFailed: a rank ended with an error; it has said which.
        Stopped: this process was told to end, and has passed that on.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Ranks of one machine talk over the loopback interface, whatever the name of the host resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="mmcl",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        **{name: value for name, value in STOPPING.items() if name in LaunchConfig.__dataclass_fields__},
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stop:
        raise Stopped(f"stopped by {stop.sigval.name}: the ranks were told to save and end") from None
    except ChildFailedError as error:
        rank, code = first_to_fail({rank: failure.exitcode for rank, failure in error.failures.items()})
        raise RankFailed(
            f"rank {rank} ended with exit code {code}; the other ranks were stopped. Its own message is "
            "above; the run resumes from its last checkpoint with the same command"
        ) from None


def first_to_fail(exit_codes: Mapping[int, int]) -> tuple[int, int]:
    """The rank to blame, and its exit code, among ranks seen to have failed at the same moment.

    A rank that was killed says nothing, and its peers fail at once because they lost it: a signal (a negative code)
    comes before an error of the rank's own, then the lowest rank.
    """
    return min(exit_codes.items(), key=lambda item: (item[1] >= 0, item[0]))
