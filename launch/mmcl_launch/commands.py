"""What each command of `mmcl` does, once its words are parsed."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.errors import ConfigError, DataError, MissingExtra
from mmcl.export import export_model
from mmcl.metrics import Progress
from mmcl_data.build.builder import build_corpus
from mmcl_data.build.corpora import CORPORA
from mmcl_data.build.img2dataset import adopt_img2dataset
from mmcl_data.build.plan import Options
from mmcl_data.build.tuxpaint import build_tuxpaint
from mmcl_data.build.world import WorldConfig, build_world
from mmcl_data.check import check_source
from mmcl_data.index import Progressed, build_index, index_folder
from mmcl_data.preview import write_preview
from mmcl_data.stats import shared_line, source_stats, stats_report, stats_table
from mmcl_data.workers import kind_names
from mmcl_evals import TaskResult, draw_curves, markdown_table, write_report, write_results
from mmcl_launch.config import RunConfig, dump_config, field_lines, load_config, standalone
from mmcl_launch.ranks import Place, place_from, start_ranks
from mmcl_launch.run import (
    environment,
    evaluate_model,
    input_digest,
    load_model,
    make_evaluators,
    open_run,
    preflight,
    saved_config,
)
from mmcl_launch.worker import leave, train_rank

log = logging.getLogger("mmcl")
Words = Sequence[str]


def data_world(args: argparse.Namespace, _: Words) -> int:
    """Make the world."""
    names = [field.name for field in dataclasses.fields(WorldConfig)]
    config = WorldConfig(**{name: getattr(args, name) for name in names})
    summary = make_world(config, args.out, args.samples, args.seed, args.test_samples, args.workers)
    print(json.dumps({"out": str(args.out), "counts": summary["counts"]}, indent=1))
    return 0


def make_world(
    config: WorldConfig, out: Path, samples: int, seed: int, test_samples: int, workers: int
) -> dict[str, Any]:
    """`build_world` with progress, in a directory beside `out` that takes its name when it is whole."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty: name a new directory or remove it")
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress("sample", total))
        bars[0].update(done)

    summary = build_world(
        config, staged, samples=samples, seed=seed, test_samples=test_samples, workers=workers, progress=show
    )
    if out.exists():
        out.rmdir()
    staged.rename(out)
    for bar in bars:
        bar.close()
    return summary


def data_build_tuxpaint(args: argparse.Namespace, _: Words) -> int:
    """Stamps to shards."""
    manifest = build_tuxpaint(args.root, args.out)
    print(json.dumps({"out": str(args.out), "counts": manifest["counts"]}, indent=1))
    return 0


def data_build(args: argparse.Namespace, _: Words) -> int:
    """A corpus to shards, or one part of it."""
    corpus = _from_args(CORPORA[args.corpus], args)
    root = args.root or Path(args.manifest).parent
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress("sample", total, start=done))  # what an earlier start did counts for no rate
        bars[0].update(done)

    try:
        manifest = build_corpus(
            args.corpus, corpus, root, args.out, options=_from_args(Options, args), part=args.part,
            workers=args.workers, progress=show,
        )  # fmt: skip
    finally:
        for bar in bars:
            bar.close()
    if missing := manifest.get("parts_missing"):
        print(f"{args.out}: this part is built; {missing} shards of other parts are not, the last part sums all up")
        return 0
    _print_build(args.out, manifest)
    return 0


def data_build_img2dataset(args: argparse.Namespace, _: Words) -> int:
    """What img2dataset wrote, looked through."""
    with _telling("shard") as told:
        manifest = adopt_img2dataset(args.root, workers=args.workers, progress=told)
    _print_build(args.root, manifest)
    return 0


def _from_args(cls: Any, args: argparse.Namespace) -> Any:
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _print_build(out: Path, manifest: dict[str, Any]) -> None:
    duplicates = {kind: found["surplus"] for kind, found in manifest["duplicates"].items()}
    facts = {"shards": len(manifest["shards"]), "counts": manifest["counts"], "duplicates": duplicates}
    print(json.dumps({"out": str(out), **facts}, indent=1))
    for where, why in manifest["skipped"][:5]:
        log.warning("left out: %s: %s", where, why)
    log.info("to decode all of it: mmcl data check %s", out)


def data_index(args: argparse.Namespace, _: Words) -> int:
    """Index shards; those that are known and unchanged are not read again."""
    folder = args.out or index_folder(args.shards)
    if folder is None:
        raise ConfigError(f"{args.shards}: these shards have no folder of their own: name one for the index with --out")
    bars: list[Progress] = []

    def show(now: Progressed) -> None:
        if not bars:
            bars.append(Progress("shard", now.of))
        bars[0].update(now.shards, f"{now.samples} samples")

    index = build_index(args.shards, folder, workers=args.workers, hashes=args.hash, progress=show)
    for bar in bars:
        bar.close()
    kinds = {kind_names(bits): int(count) for bits, count in enumerate(np.bincount(index.kinds)) if count}
    facts = {"shards": len(index.shards), "samples": len(index), "kinds": kinds, "fingerprint": index.fingerprint}
    print(json.dumps({"out": str(folder), **facts}, indent=1))
    return 0


def data_check(args: argparse.Namespace, _: Words) -> int:
    """List problems; 1 if there are any."""
    problems = 0
    for spec in args.shards:
        with _telling("shard") as told:
            report = check_source(spec, None, print, workers=args.workers, told=told)
        problems += report.problems
        held = ", ".join(f"{count} {what}" for what, count in sorted(report.combinations.items()))
        unread = ", ".join(f"{count} .{what or '(none)'}" for what, count in sorted(report.unread.items()) if count)
        print(f"{spec}: {report.shards} shards, {report.samples} samples ({held}), {report.problems} problems")
        if unread:
            print(f"{spec}: members that nothing reads, by extension: {unread}")
    return 1 if problems else 0


def data_stats(args: argparse.Namespace, _: Words) -> int:
    """Print what sources hold."""
    if args.json and not args.json.parent.is_dir():  # before hours of reading
        raise ConfigError(f"--json {args.json}: there is no such folder")
    tallies = {}
    for spec in args.shards:
        with _telling("shard") as told:
            tallies[spec] = source_stats(spec, workers=args.workers, tokens=args.tokens, told=told)
    found = stats_report(tallies)
    print("\n".join([*map(stats_table, found["sources"]), *map(shared_line, found["shared"])]))
    if args.json:
        try:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {args.json}: cannot be written: {error.strerror}") from error
    return 0


def data_preview(args: argparse.Namespace, _: Words) -> int:
    """Write the page."""
    with _telling("sample") as told:
        found = write_preview(
            args.shards, args.out, samples=args.samples, seed=args.seed, seconds=args.seconds, told=told
        )
    print(json.dumps({"out": str(args.out), **found}, indent=1))
    return 0


@contextlib.contextmanager
def _telling(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress in so many `what`, as many as the first call says; gone at the end."""
    bars: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(what, total))
        bars[0].update(done)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


def train(args: argparse.Namespace, overrides: Words) -> int:
    """Start the ranks of a run, or be one of them where a launcher started this process."""
    config = standalone(load_config(args.config, overrides))
    folder = args.out or Path("runs") / Path(args.config[-1]).stem
    place = place_from(os.environ)
    if place is not None:
        return _train_placed(config, folder, place, args)
    plan = preflight(config, args.nproc)
    if args.dry_run:
        print(json.dumps({"out": str(folder), **plan}, indent=1))
        return 0
    train_here(config, folder, args.nproc)
    print(f"run: {folder}")
    return 0


def train_here(config: RunConfig, folder: Path, nproc: int) -> None:
    """Train on this machine with `nproc` ranks, each a process."""
    open_run(folder, standalone(config))
    start_ranks("mmcl_launch.worker", [str(folder)], nproc)


def _train_placed(config: RunConfig, folder: Path, place: Place, args: argparse.Namespace) -> int:
    if args.nproc != 1:
        raise ConfigError(f"--nproc {args.nproc}: a launcher started this process as rank {place.rank} already")
    if place.rank == 0:
        plan = preflight(config, place.world)
        if args.dry_run:
            print(json.dumps({"out": str(folder), **plan}, indent=1))
        else:
            open_run(folder, config)
    if not args.dry_run:
        leave(train_rank(config, folder, place))
    return 0


def evaluate(args: argparse.Namespace, overrides: Words) -> int:
    """Score a model and write results, table and report."""
    if other := [word for word in overrides if word.startswith("--") and not word.startswith("--evals.")]:
        raise ConfigError(f"{other[0]}: an evaluation takes the model as it is; only --evals.* can be set")
    if args.config:
        config = load_config(args.config, overrides)
    elif (args.model / "config.yaml").exists():
        config = load_config([str(args.model / "config.yaml")], overrides)
    else:
        raise ConfigError(f"{args.model} names no evaluations of its own: say which with --config RECIPE")
    if args.dry_run:
        model, _ = load_model(args.model)
        for evaluator in make_evaluators(config.evals, model.spec, limit=1):
            print(evaluator.name)
        return 0
    _, report = evaluate_to(args.model, config, args.out or args.model / "eval", _command_line())
    print(f"report: {report}")
    return 0


def evaluate_to(folder: Path, config: RunConfig, out: Path, command: str) -> tuple[list[TaskResult], Path]:
    """Score the model in `folder`, print the table, write JSON and a report; returns results and the report's path."""
    model, facts = load_model(folder)
    results = evaluate_model(model, config.evals)
    facts |= {
        "name": folder.name,
        "pretrained": f"step_{facts['step']}",
        "embed_dim": model.embed_dim,
        "preprocess_sha256": input_digest(model),
    }
    print(markdown_table(results))
    write_results(results, out, model=facts, data={"limit": config.evals.limit}, env=environment())
    plots: list[Path] = []
    try:
        plots += draw_curves(folder / "metrics.jsonl", out / "curves") if (folder / "metrics.jsonl").exists() else []
    except (MissingExtra, DataError) as error:
        log.warning("no picture of the curves: %s", error)
    report = write_report(results, out, title=f"{folder.name}, step {facts['step']}", reproduce=command, plots=plots)
    return results, report


def export(args: argparse.Namespace, _: Words) -> int:
    """Write and verify an export."""
    manifest = export_run(args.run, args.out)
    print(json.dumps({"out": str(args.out), "difference": manifest["difference"]}, indent=1))
    return 0


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Export the last checkpoint of a run directory."""
    saved_config(run)
    model, facts = load_model(run)
    kept = {name: facts[name] for name in ("step", "samples_seen", "weights_sha256")}
    return export_model(model, out, {"run": run.name, **kept})


def config_show(args: argparse.Namespace, overrides: Words) -> int:
    """Print the resolved tree."""
    print(dump_config(load_config(args.config, overrides)), end="")
    return 0


def config_fields(_: argparse.Namespace, __: Words) -> int:
    """Print every field, as the Markdown table that launch/README.md holds."""
    print(fields_table(), end="")
    return 0


def fields_table() -> str:
    """Every field of a run with its default and meaning."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default}` | {doc} |" for name, default, doc in field_lines()]
    return "\n".join(lines) + "\n"


def _command_line() -> str:
    return " ".join(["mmcl", *sys.argv[1:]])
