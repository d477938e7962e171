"""The whole path on a laptop: make the world, train on it, score the model, export it, load the export."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mmcl.errors import ConfigError
from mmcl.train import split_of
from mmcl_data.build.world import WorldConfig
from mmcl_launch.commands import evaluate_to, export_run, make_world, train_here
from mmcl_launch.config import RunConfig, load_config
from mmcl_launch.run import check_engine, load_model, preflight

log = logging.getLogger("mmcl")

WORLD = WorldConfig(image_size=48, clip_seconds=1.92, sizes=False, textures=False)
"""As small as the towers of the recipe read it, and simple enough for them to learn in a few minutes."""


def demo(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it all below `args.out`; what is there from an earlier demo is used again."""
    out, samples, nproc = args.out, args.samples, args.nproc
    config = demo_config(out / "world", overrides)
    if args.dry_run:
        print(f"make {samples} training samples in {out / 'world'}")
        print(f"train {config.train.steps} steps with {config.engine.name} on {nproc} ranks in {out / 'run'}")
        print(f"evaluate into {out / 'run' / 'eval'}, export to {out / 'export'}")
        return 0
    split_of(config.train.batch_size, nproc)
    check_engine(config.engine)
    _make_data(out / "world", samples)
    preflight(config, nproc)
    train_here(config, out / "run", nproc)
    command = f"mmcl demo --out {out} --samples {samples} --nproc {nproc} {' '.join(overrides)}".strip()
    _, report = evaluate_to(out / "run", config, out / "run" / "eval", command)
    exported = out / "export"
    if not exported.exists():
        export_run(out / "run", exported)
    manifest = json.loads((exported / "mmcl.json").read_text())
    if manifest["weights_sha256"] != load_model(out / "run")[1]["weights_sha256"]:
        raise ConfigError(f"{exported} is the export of another run: remove it, and the same command makes it anew")
    worst = max(manifest["difference"].values())
    print(f"report: {report}")
    print(f"curves: {report.with_name('curves.png')}")
    print(f"export: {exported} (loads in open_clip as local-dir:{exported}; largest difference {worst:.1e})")
    return 0


def demo_config(world: Path, overrides: Sequence[str]) -> RunConfig:
    """The recipe `world`, reading from `world`."""
    here = load_config(["world"])
    moved = []
    for section, entries in (("data.sources", here.data.sources), ("evals.classes", here.evals.classes)):
        for name, entry in entries.items():
            field = "shards" if section == "data.sources" else "folder"
            moved.append(f"--{section}.{name}.{field}={world / Path(getattr(entry, field)).relative_to('world')}")
    for section in ("retrieval", "compositional"):
        for name, entry in getattr(here.evals, section).items():
            moved.append(f"--evals.{section}.{name}.shards={world / Path(entry.shards).relative_to('world')}")
    return load_config(["world"], [*moved, *overrides])


def _make_data(world: Path, samples: int) -> None:
    made = world / "world.json"
    if made.exists():
        there = json.loads(made.read_text())
        count = sum(count for part, count in there["counts"].items() if part.startswith("train/"))
        if (count, there["seed"], there["config"]) != (samples, 0, dataclasses.asdict(WORLD)):
            raise ConfigError(
                f"{world} holds another world ({count} training samples): remove it or name another --out"
            )
        log.info("using the world in %s", world)
        return
    make_world(WORLD, world, samples, seed=0, test_samples=512, workers=2)
