"""The scripts in slurm/ under a fake srun and scontrol, and where a process finds itself among the ranks."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mmcl.errors import ConfigError
from mmcl.testing import tiny_config
from mmcl_data.build.world import WorldConfig, build_world
from mmcl_launch.ranks import Place, first_to_fail, place_from

SLURM = Path(__file__).parents[2] / "slurm"
JOBS: list[subprocess.Popen[str]] = []
"""Of the test that runs, each the leader of its processes."""

# Starts the tasks, hands signals to them, ends with the highest exit status: what the scripts rely on in srun.
SRUN = """
import json, os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
options = options[: next(i for i, word in enumerate(sys.argv[1:]) if not word.startswith("--"))]
with open("srun.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, file)
count = int(os.environ["SLURM_NTASKS"])
per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", count))
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda got, _: [task.send_signal(got) for task in tasks])
for rank in range(count):
    own = {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)}
    nodes = {"SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{count // per_node})"}
    tasks.append(subprocess.Popen(sys.argv[1 + len(options) :], env=os.environ | own | nodes))
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """
import sys
assert sys.argv[1:] == ["show", "hostnames", "gpu[07-08]"], sys.argv
print("gpu07", "gpu08", sep="\\n")
"""

# Says what it was asked and where it stands; with WAIT it ends when it is told to.
MMCL = """
import json, os, signal, sys, time
from dataclasses import asdict
from pathlib import Path
from mmcl_launch.ranks import place_from
told = []
signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
name = os.environ["SLURM_PROCID"]
def say(what):
    Path(f"{what}-{name}.tmp").write_text(json.dumps({"argv": sys.argv[1:], "place": asdict(place_from(os.environ))}))
    Path(f"{what}-{name}.tmp").rename(f"{what}-{name}.json")
say("began")
while "WAIT" in os.environ and not told:
    time.sleep(0.01)
if told:
    say("told")
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder with .venv/bin/mmcl and the commands of Slurm, all fake. What a failed test leaves running is ended."""
    for name, code in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/mmcl": MMCL}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)
    JOBS.clear()
    yield tmp_path
    for job in JOBS:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def submit(checkout: Path, script: str, *words: str, **env: str) -> subprocess.Popen[str]:
    """Run a script as Slurm runs it on the first node of a job."""
    given = {"SLURM_JOB_ID": "23456", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    base = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "HOME": str(checkout)}
    spooled = shutil.copy(SLURM / script, checkout / "slurm_script")  # Slurm runs a copy, so $0 is of no use
    job = subprocess.Popen(
        ["bash", spooled, *words], cwd=checkout, env=base | given | env, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    JOBS.append(job)
    return job


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = job.communicate(timeout=60)
    return job.returncode, errors


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def wait_for(what: Callable[[], bool], job: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        if job.poll() is not None or time.monotonic() > end:
            job.kill()
            raise AssertionError(f"the job ended or nothing happened: {job.communicate()}")
        time.sleep(0.01)


FOUR = {"CONFIG": "my world.yaml", "OUT": "runs/a b", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}


def test_every_rank_of_a_training_job_finds_its_place_and_the_first_node(checkout):
    status, errors = finish(submit(checkout, "train.sbatch", "--train.steps", "10", **FOUR, SLURM_CPUS_PER_TASK="3"))
    assert status == 0, errors
    ranks = [read(checkout / f"began-{rank}.json") for rank in range(4)]
    wanted = ["train", "--config", "my world.yaml", "--out", "runs/a b", "--train.steps", "10"]
    for number, rank in enumerate(ranks):
        assert rank["argv"] == wanted
        assert Place(**rank["place"]) == Place(
            rank=number,
            world=4,
            local_rank=number % 2,
            local_world=2,
            address="gpu07",
            port=10000 + 23456 % 20000,
            launcher="slurm",
        )
    srun = read(checkout / "srun.json")
    assert srun["argv"] == ["--kill-on-bad-exit=1", "mmcl", *wanted]
    assert srun["env"]["SRUN_CPUS_PER_TASK"] == "3"


@pytest.mark.parametrize("job_id", ["1", "19999", "20000", "4294901760"])
def test_the_port_lies_below_those_that_kernels_hand_out(checkout, job_id):
    status, errors = finish(submit(checkout, "train.sbatch", **FOUR, SLURM_JOB_ID=job_id))
    assert status == 0, errors
    assert 10000 <= int(read(checkout / "srun.json")["env"]["MASTER_PORT"]) < 30000


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("code", [0, 7])
def test_a_signal_reaches_the_ranks_and_the_job_ends_as_they_end(checkout, number, code):
    job = submit(checkout, "train.sbatch", **FOUR, WAIT="yes", STATUS=str(code))
    wait_for(lambda: len(list(checkout.glob("began-*.json"))) == 4, job)
    job.send_signal(number)
    assert finish(job) == (code, "")
    assert len(list(checkout.glob("told-*.json"))) == 4


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_status_of_a_job_is_that_of_its_command(checkout, code):
    assert finish(submit(checkout, "train.sbatch", **FOUR, STATUS=str(code))) == (code, "")
    assert finish(submit(checkout, "eval.sbatch", MODEL="runs/a", STATUS=str(code))) == (code, "")


@pytest.mark.parametrize("missing", ["CONFIG", "OUT"])
def test_a_training_job_without_config_or_run_directory_starts_nothing(checkout, missing):
    status, errors = finish(submit(checkout, "train.sbatch", **{k: v for k, v in FOUR.items() if k != missing}))
    assert status != 0
    assert missing in errors
    assert not (checkout / "srun.json").exists()


@pytest.mark.parametrize(("env", "out"), [({}, "runs/a b/eval"), ({"OUT": "scores"}, "scores")])
def test_an_evaluation_writes_below_its_model_unless_told_otherwise(checkout, env, out):
    status, errors = finish(submit(checkout, "eval.sbatch", "--evals.limit", "9", MODEL="runs/a b", **env))
    assert status == 0, errors
    assert read(checkout / "began-0.json")["argv"] == ["eval", "runs/a b", "--out", out, "--evals.limit", "9"]


def test_each_task_of_an_array_checks_its_own_source(checkout):
    sources = ["a/{0..9}.tar", "b c", "d"]
    for task, source in enumerate(sources):
        array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_ID": str(task)}
        status, errors = finish(submit(checkout, "shards.sbatch", *sources, **array))
        assert status == 0, errors
        assert read(checkout / "began-0.json")["argv"] == ["data", "check", source]


@pytest.mark.parametrize(("count", "highest"), [("1", "1"), ("2", "1"), ("3", "3"), ("4", "3"), ("0", "0")])
def test_an_array_that_would_leave_a_source_unchecked_is_refused(checkout, count, highest):
    array = {"SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MAX": highest, "SLURM_ARRAY_TASK_ID": "0"}
    status, errors = finish(submit(checkout, "shards.sbatch", "a", "b", "c", **array))
    assert status == 2
    assert "3 sources need --array=0-2" in errors
    assert not (checkout / "srun.json").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.glob("*.sbatch")))
def test_no_directive_stands_where_sbatch_no_longer_reads(script):
    lines = (SLURM / script).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if re.match(r"#\s*SBATCH", line)]
    assert directives
    assert max(directives) < first_command


@pytest.mark.slow
def test_a_job_stopped_by_usr1_has_saved_and_the_same_line_goes_on(checkout):
    (checkout / ".venv/bin/mmcl").write_text(f'#!/bin/sh\nexec {sys.executable} -m mmcl_launch.cli "$@"\n')
    (checkout / "bin/scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    world = WorldConfig(num_shapes=2, num_colours=2, num_timbres=2, num_pitches=2, image_size=32, clip_seconds=0.5)
    build_world(world, checkout / "world", samples=40, seed=0, test_samples=1)
    recipe = {
        "data": {"sources": {"world": {"shards": "world/train/image_text"}}},
        "model": {"clip": tiny_config().clip, "audio": asdict(tiny_config().audio)},
        "train": {"steps": 100_000, "batch_size": 4, "log_every": 1, "save_every": 100_000},
    }
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    steps = [0]
    for _ in range(2):
        job = submit(checkout, "train.sbatch", CONFIG="tiny.yaml", OUT="run", SLURM_NTASKS="2", OMP_NUM_THREADS="1")
        wait_for(lambda before=steps[-1]: last_step(checkout) > before, job, seconds=200)
        job.send_signal(signal.SIGUSR1)
        status, errors = finish(job)
        assert status == 0, errors
        steps.append(last_step(checkout))
    saved = sorted(int(path.name.removeprefix("step-")) for path in (checkout / "run/checkpoints").glob("step-*"))
    assert [0, *saved] == steps


def last_step(checkout: Path) -> int:
    metrics = checkout / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


SRUN_2_OF_4 = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "gpu07", "MASTER_PORT": "11111",
}  # fmt: skip
TORCHRUN_1_OF_2 = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "22222",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (
            SRUN_2_OF_4,
            Place(rank=2, world=4, local_rank=0, local_world=2, address="gpu07", port=11111, launcher="slurm"),
        ),
        (TORCHRUN_1_OF_2, Place(rank=1, world=2, local_rank=1, local_world=2, address="localhost", port=22222)),
        (
            SRUN_2_OF_4 | TORCHRUN_1_OF_2,  # torchrun under srun: Slurm's variables are those of the agent
            Place(rank=1, world=2, local_rank=1, local_world=2, address="localhost", port=22222),
        ),
    ],
    ids=["srun", "torchrun", "torchrun under srun"],
)
def test_a_rank_finds_its_place(environ, place):
    assert place_from(environ) == place


@pytest.mark.parametrize("environ", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}])
def test_a_process_that_nobody_launched_has_no_place(environ):
    assert place_from(environ) is None


def test_the_only_task_of_a_step_needs_no_address():
    place = place_from({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"})
    assert place and (place.rank, place.world, place.local_world, place.launcher) == (0, 1, 1, "slurm")


@pytest.mark.parametrize(
    ("environ", "lacking", "says"),
    [
        (SRUN_2_OF_4, "SLURM_PROCID", "srun"),
        (SRUN_2_OF_4, "SLURM_STEP_ID", "srun"),  # a batch script has a SLURM_PROCID, too
        (SRUN_2_OF_4, "MASTER_ADDR", "MASTER_ADDR"),
        (SRUN_2_OF_4, "MASTER_PORT", "MASTER_PORT"),
        (TORCHRUN_1_OF_2, "WORLD_SIZE", "WORLD_SIZE"),
        (TORCHRUN_1_OF_2, "MASTER_ADDR", "MASTER_ADDR"),
    ],
)
def test_a_place_half_told_is_an_error_that_names_what_is_missing(environ, lacking, says):
    with pytest.raises(ConfigError, match=says):
        place_from({name: value for name, value in environ.items() if name != lacking})


@pytest.mark.parametrize("name", ["MASTER_PORT", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_place_that_is_no_number_is_an_error(name):
    with pytest.raises(ConfigError, match="numbers"):
        place_from(SRUN_2_OF_4 | {name: "any"})


@pytest.mark.parametrize(
    ("exit_codes", "blamed"),
    [
        ({0: 1, 1: -9}, (1, -9)),  # rank 0 lost its peer and was seen to fail in the same moment
        ({2: 2, 1: 2}, (1, 2)),
        ({0: 1}, (0, 1)),
    ],
)
def test_of_ranks_that_failed_together_the_killed_one_is_blamed(exit_codes, blamed):
    assert first_to_fail(exit_codes) == blamed
