"""The shipped recipes on their real data, shortened."""

import json
import os
from pathlib import Path

import pytest
from launch_cases import SMALL, curve, mmcl

STAMPS = Path("/usr/share/tuxpaint/stamps")


@pytest.mark.slow
@pytest.mark.tuxpaint
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not STAMPS.is_dir() and "CI" not in os.environ, reason="Debian's tuxpaint-stamps-default is not installed"
)
def test_the_tuxpaint_recipe_learns_real_drawings_and_sounds(tmp_path):
    built = mmcl("data", "build", "tuxpaint", "--root", STAMPS, "--out", "tuxpaint", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert mmcl("data", "check", "tuxpaint/train", cwd=tmp_path).returncode == 0
    short = ["--train.steps=120", "--train.save_every=120", "--train.eval_every=0", "--optim.warmup_steps=10"]
    words = ["--config", "tuxpaint", "--nproc", 2, "--out", "run", *short]
    done = mmcl("train", *words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [loss for _, loss, *_ in curve(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    scored = mmcl("eval", "run", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr[-3000:]
    for name, n in (("stamps_drawings", 200), ("stamps_sounds", 130)):
        result = json.loads((tmp_path / "run" / "eval" / f"zeroshot_retrieval__{name}.json").read_text())
        assert result["mmcl"]["n"] == n
        # so early, who is first is still chance from one order of samples to another; who is among the first ten is not
        metric = result["mmcl"]["main_metric"].replace("_r1", "_r10")
        assert result["mmcl"]["by_metric"][metric]["chance"] < 0.1
        assert result["mmcl"]["ci95"][metric][0] > 0.5


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_goes_the_whole_path_and_uses_again_what_is_there(tmp_path):
    small = [word for word in SMALL if not word.startswith("--model")]
    words = ["demo", "--out", "demo", "--samples", 300, *small, "--train.steps=4", "--evals.limit=40"]
    done = mmcl(*words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("| world_shapes | acc1 |", "report: demo/run/eval/report.md", "curves: ", "export: demo/export"):
        assert part in done.stdout
    first = (tmp_path / "demo" / "export" / "mmcl_model.safetensors").stat().st_mtime
    again = mmcl(*words, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "demo" / "export" / "mmcl_model.safetensors").stat().st_mtime == first
    other = mmcl("demo", "--out", "demo", "--samples", 301, cwd=tmp_path)
    assert other.returncode == 2 and "name another --out" in other.stderr
