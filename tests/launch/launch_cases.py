"""A world and a model small enough to train in seconds, and the command line as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

MMCL = str(Path(sys.executable).with_name("mmcl"))
SMALL = [
    "--model.clip.embed_dim=16",
    "--model.clip.vision_cfg={image_size: 32, patch_size: 16, layers: 1, width: 32, head_width: 16, mlp_ratio: 4.0}",
    "--model.clip.text_cfg={context_length: 24, vocab_size: 49408, width: 16, heads: 2, layers: 1}",
    "--model.audio={clip_seconds: 0.64, mels: 32, hop_ms: 20, window_ms: 32, width: 32, layers: 1, heads: 2}",
    "--train.batch_size=24",
    "--train.log_every=2",
    "--train.save_every=4",
    "--train.eval_every=0",
    "--optim.warmup_steps=2",
    "--evals.limit=64",
    "--evals.limit_in_training=32",
]


def mmcl(*words, cwd, timeout=240, env=None):
    """Run `mmcl WORDS` and return the finished process, output captured."""
    return subprocess.run(
        [MMCL, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env, check=False
    )


def metrics(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path):
    """Step, loss and gradient norm of each logged step: what a run is, without its timings."""
    return [(m["step"], m["loss"], m["grad_norm"], m["loss_info_nce_image_text"]) for m in metrics(run) if "loss" in m]
