"""The command line, run as a user runs it: real processes, a real world, real ranks."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from launch_cases import MMCL, SMALL, curve, metrics, mmcl

from mmcl_launch.cli import build_parser, main

VERBS = ["", "data", "data world", "data build", "data build tuxpaint", "data build manifest", "data check",
         "data stats", "data preview", "train", "eval", "export",
         "config", "config show", "config fields", "demo"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a small world in `world`."""
    folder = tmp_path_factory.mktemp("cli")
    words = ["--samples", 200, "--seed", 3, "--test-samples", 40, "--image-size", 32, "--clip-seconds", 0.64]
    done = mmcl("data", "world", "--out", "world", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["test/audio_text"] == 40
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A run of 12 steps with DeepSpeed ZeRO-1 on two ranks, in `run`."""
    done = mmcl("train", "--config", "world", "--nproc", 2, "--out", "run", *SMALL, "--train.steps=12", cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "run"


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_explains_itself(verb):
    done = mmcl(*verb.split(), "--help", cwd=".")
    assert done.returncode == 0 and "usage: mmcl" in done.stdout


def test_help_loads_no_torch():
    code = (
        "import sys; from mmcl_launch.cli import build_parser, main; build_parser(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([str(Path(MMCL).with_name("python")), "-c", code], check=False).returncode == 0


def test_the_flags_of_the_world_are_its_settings():
    args = build_parser().parse_args(["data", "world", "--out", "x", "--samples", "9"])
    assert (args.mention_order, args.num_shapes, args.textures) == ("free", 8, True)
    args = build_parser().parse_args(
        ["data", "world", "--out", "x", "--samples", "9", "--textures", "false", "--mention-order", "fixed"]
    )
    assert (args.mention_order, args.textures) == ("fixed", False)


def test_a_run_learns_and_leaves_what_it_promises(trained):
    losses = [loss for _, loss, *_ in curve(trained)]
    assert len(losses) == 6 and statistics.mean(losses[-2:]) < losses[0]
    for name in ("config.yaml", "environment.json", "log.txt", "metrics.jsonl"):
        assert (trained / name).stat().st_size > 0
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == ["step-000000008", "step-000000012"]
    last = metrics(trained)[-1]
    assert last["step"] == 12 and "eval/world_shapes/acc1" in last
    assert last["eval_chance/world_shapes/acc1"] == 1 / 64


def test_scores_report_and_curves_are_written(trained):
    done = mmcl("eval", trained, cwd=trained.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| world_timbres | acc1 |" in done.stdout
    results = {path.name: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    assert "zeroshot_classification__world_shapes.json" in results and len(results) == 7
    shapes = results["zeroshot_classification__world_shapes.json"]
    low, high = shapes["mmcl"]["ci95"]["acc1"]
    assert shapes["mmcl"]["n"] == 64 and low <= shapes["metrics"]["acc1"] <= high
    assert shapes["mmcl"]["data"]["skipped"] == {"decode_error": 0} and len(shapes["mmcl"]["data"]["sha256"]) == 64
    assert shapes["mmcl"]["model"]["samples_seen"] == 12 * 24
    assert len({result["mmcl"]["data"]["sha256"] for result in results.values()}) == 5, "scenes are those of retrieval"
    report = (trained / "eval" / "report.md").read_text()
    assert "curves.png" in report and f"mmcl eval {trained}" in report
    assert (trained / "eval" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_export_gives_the_scores_of_its_run(trained):
    out = trained.parent / "export"
    done = mmcl("export", trained, "--out", out, cwd=trained.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(json.loads(done.stdout)["difference"].values()) <= 1e-5
    both = []
    for number, model in enumerate((trained, out)):
        where = trained.parent / f"scores{number}"
        words = ["--config", trained / "config.yaml", "--out", where, "--evals.limit=32"]
        done = mmcl("eval", model, *words, cwd=trained.parent)
        assert done.returncode == 0, done.stderr[-3000:]
        both.append({path.name: json.loads(path.read_text())["metrics"] for path in where.glob("*.json")})
    assert both[0] == both[1] and len(both[0]) == 7


@pytest.mark.parametrize(("number", "nproc"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_end(place, number, nproc):
    words = ["--config", "world", "--nproc", nproc, *SMALL, "--engine.name=plain", "--train.steps=60"]
    words += ["--train.save_every=60", "--out"]
    stopped, whole = place / f"stopped{number}", place / f"whole{number}"
    process = start("train", *words, stopped, cwd=place)
    wait_for((stopped / "metrics.jsonl").exists)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and f"Stopped: stopped by {number.name}" in said and "Traceback" not in said
    assert "the same command goes on" in said and workers_of(str(stopped)) == []
    saved = sorted((stopped / "checkpoints").iterdir())
    assert len(saved) == 1 and saved[0].name != "step-000000060", "it should have stopped early"
    for run in (stopped, whole):
        done = mmcl("train", *words, run, cwd=place)
        assert done.returncode == 0, done.stderr[-3000:]
    logged = {step for step, *_ in curve(whole)}
    assert [line for line in curve(stopped) if line[0] in logged] == curve(whole)
    one, two = (run / "checkpoints" / "step-000000060" / "state.safetensors" for run in (whole, stopped))
    assert one.read_bytes() == two.read_bytes()


def start(*words, cwd):
    """Start `mmcl WORDS` without waiting for it; what it says comes back as one text."""
    command = [MMCL, *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


def test_a_rank_that_dies_takes_the_others_along_and_no_second_start_gets_in(place):
    out = place / "killed"
    words = ["--config", "world", "--nproc", 2, "--out", out, *SMALL, "--train.steps=100000"]
    words += ["--train.save_every=100000", "--engine.name=plain"]
    process = start("train", *words, cwd=place)
    try:
        wait_for((out / "metrics.jsonl").exists)
        ranks = workers_of(str(out))
        assert len(ranks) == 2
        second = mmcl("train", *words, cwd=place)
        assert second.returncode == 2 and "another process is training in this directory" in second.stderr
        assert process.poll() is None
        os.kill(ranks[1], signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2
        assert "RankFailed" in said and "exit code -9" in said
        assert workers_of(str(out)) == []
    finally:
        process.kill()


def workers_of(run: str) -> list[int]:
    """Process ids of the ranks of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"mmcl_launch.worker" in words and run.encode() in words:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "nothing"], "no file and no recipe 'nothing'"),
        (["train", "--config", "world", "--nproc", "5", *SMALL], "cannot be shared by 5 ranks"),
        (["train", "--config", "world", "--nproc", "0", *SMALL], "at least one rank"),
        (
            ["train", "--config", "world", *SMALL, "--data.sources.image_text.shards=elsewhere"],
            "elsewhere: there is no such shard",
        ),
        (["train", "--config", "world", *SMALL, "--data.sources.image_text.shards=pipe:ls"], "no shell command"),
        (["train", "--config", "world", *SMALL, "--engine.deepspeed=zero9"], "neither zero0"),
        (
            ["train", "--config", "world", *SMALL, "--evals.classes.world_shapes.folder=none"],
            "classnames.txt is missing",
        ),
        (["train", "--config", "world", *SMALL, "--engine.deepspeed=bf16.json"], "sets a precision"),
        (["train", "--config", "world", *SMALL, "--train.init_from=none"], "no open_clip weights"),
        (["train", "--config", "world", *SMALL, "--evals.limit=0"], "at least 1"),
        (["eval", "nowhere", "--config", "world", "--model.resize_mode=squash"], "only --evals.* can be set"),
        (["eval", "nowhere"], "names no evaluations"),
        (["eval", "nowhere", "--config", "world"], "is no run directory"),
        (["export", "nowhere", "--out", "x"], "is no run directory"),
        (["data", "check", "nowhere"], "ShardMissing"),
        (["data", "check", "world/test/image_text", "--workers", "0"], "workers=0: at least one"),
        (["data", "stats", "world/test/image_text", "--json", "no/where.json"], "--json no/where.json: there is no"),
        (["data", "preview", "nowhere", "--out", "page.html"], "ShardMissing"),
        (["data", "preview", "world/test/image_text", "--out", "no/page.html"], "cannot be written there"),
        (["data", "world", "--out", "x", "--samples", "9", "--num-shapes", "99"], "num_shapes=99 is out of range"),
        (["data", "build", "tuxpaint", "--root", "none", "--out", "x"], "apt-get install"),
        (["data", "build", "manifest", "--manifest", "none.csv", "--out", "x"], "none.csv is missing"),
    ],
)
def test_a_mistake_is_explained_in_one_line(place, words, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    Path("bf16.json").write_text('{"bf16": {"enabled": true}}')
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("mmcl: ") and said.count("\n") == 1
    assert not (place / "runs").exists()


def test_a_mistake_ends_the_process_with_status_2_and_no_traceback(place):
    done = mmcl("train", "--config", "world", "--train.stepz=1", cwd=place)
    assert done.returncode == 2 and "did you mean train.steps" in done.stderr and "Traceback" not in done.stderr


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "run", "--out", "x", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["train", "--config", "world", "--nproc", "2", "--out", "dry", "--dry-run", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"] == 2 and plan["batch"] == "24 = 2 x 12" and plan["samples"]["image_text"] == 80
    assert main(["demo", "--dry-run", "--out", "dry"]) == 0
    assert not (place / "dry").exists()


def test_damage_is_found_before_training_and_by_the_check(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("world/train/image_text", "bad")
    assert main(["data", "check", "bad"]) == 0
    shard = next(Path("bad").iterdir())
    shard.write_bytes(shard.read_bytes()[:-20000])
    assert main(["data", "check", "bad"]) == 1
    assert f"{shard}: shard: byte {shard.stat().st_size}: cut off" in capsys.readouterr().out
    assert main(["train", "--config", "world", *SMALL, "--data.sources.image_text.shards=bad"]) == 2
    said = capsys.readouterr().err
    assert "ShardDamaged" in said and str(shard) in said


def test_statistics_and_a_preview_are_made_of_what_the_world_holds(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = ["world/train/image_audio_text", "world/test/image_audio_text"]
    assert main(["data", "stats", *words, "--json", "stats.json"]) == 0
    said = capsys.readouterr().out
    assert "world/test/image_audio_text: 1 shards, 40 samples" in said and "audio+facts+image+text 40" in said
    train, test = json.loads(Path("stats.json").read_text())["sources"]
    assert train["samples"] == 60 and test["spreads"]["image width, px"]["p100"] == 32
    assert main(["data", "preview", *words, "--out", "page.html", "--samples", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 7
    assert Path("page.html").read_text().count("<figure>") == 7 and "foils." in Path("page.html").read_text()


def test_a_diverged_run_names_its_steps_and_saves_nothing(place):
    words = [*SMALL, "--engine.name=plain", "--optim.lr=1e30", "--optim.clip_norm=0", "--train.steps=8"]
    done = mmcl("train", "--config", "world", "--out", "diverged", *words, cwd=place)
    assert done.returncode == 2 and "NonFiniteLoss" in done.stderr and "within steps [" in done.stderr
    assert not list((place / "diverged").glob("checkpoints/step-*"))
