"""The command `mmcl`. Nothing heavy is imported before a command runs, so that every --help is instant."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcl import __version__
from mmcl.errors import ConfigError, MmclError
from mmcl_data.build.corpora import CORPORA
from mmcl_data.build.plan import Options
from mmcl_data.build.world.config import WorldConfig
from mmcl_launch.fields import field_docs

FIELDS = "Any field of the run can follow as --section.field VALUE; `mmcl config fields` lists them."


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, without running anything."""
    parser = argparse.ArgumentParser(
        prog="mmcl", description="Contrastive pretraining over images, text and audio: shards in, exports out."
    )
    parser.add_argument("--version", action="version", version=f"mmcl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    _add_data(verbs.add_parser("data", help="make and check WebDataset shards"))

    train = verbs.add_parser("train", help="train a model, or go on with a run", epilog=FIELDS)
    _add_config(train)
    train.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE); an existing run is resumed")
    train.add_argument("--nproc", type=int, default=1, help="ranks to start on this machine (default: 1)")
    _add_dry_run(train)
    train.set_defaults(command="train", overridable=True)

    evaluate = verbs.add_parser("eval", help="score a run or an export", epilog=FIELDS)
    evaluate.add_argument("model", type=Path, help="directory of a run or of an export")
    evaluate.add_argument("--config", nargs="+", default=[], help="recipe whose evals to run (default: the run's own)")
    evaluate.add_argument("--out", type=Path, help="where results go (default: MODEL/eval)")
    _add_dry_run(evaluate)
    evaluate.set_defaults(command="eval", overridable=True)

    export = verbs.add_parser("export", help="write a directory that mmcl and open_clip load")
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument("--out", type=Path, required=True, help="new directory")
    export.set_defaults(command="export", overridable=False)

    _add_show(verbs.add_parser("config", help="look at recipes and fields"))
    demo = verbs.add_parser("demo", help="the whole path in a few minutes: data, training, scores, export")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory for all of it (default: runs/demo)"
    )
    demo.add_argument("--samples", type=int, default=16000, help="training samples to make (default: 16000)")
    demo.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    _add_dry_run(demo)
    demo.set_defaults(command="demo", overridable=True)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    world = actions.add_parser("world", help="make the procedural three-modality data set")
    world.add_argument("--out", type=Path, required=True, help="new directory")
    world.add_argument("--samples", type=int, required=True, help="training samples over all sources")
    world.add_argument("--seed", type=int, default=0, help="decides every byte (default: 0)")
    world.add_argument("--test-samples", type=int, default=512, help="test samples of each source (default: 512)")
    world.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    docs = field_docs(WorldConfig)
    for field in dataclasses.fields(WorldConfig):
        doc = f"{docs[field.name]} (default: {field.default})".replace("%", "%%")
        kind = _switch if isinstance(field.default, bool) else type(field.default)
        world.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=doc)
    world.set_defaults(command="data world", overridable=False)

    build = actions.add_parser("build", help="turn a corpus on disk into shards")
    corpora = build.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    tuxpaint = corpora.add_parser("tuxpaint", help="Debian's tuxpaint-stamps-default: drawings, captions, sounds")
    tuxpaint.add_argument("--root", type=Path, required=True, help="the package's `stamps` folder")
    tuxpaint.add_argument("--out", type=Path, required=True, help="new directory")
    tuxpaint.set_defaults(command="data build tuxpaint", overridable=False)
    _add_corpora(corpora)

    index = actions.add_parser("index", help="note where every sample lies, so that a run can mix and resume them")
    index.add_argument("shards", help="tar, directory, glob or brace pattern; local, http(s)://, s3:// or hf://")
    index.add_argument("--out", type=Path, help="folder of the index (default: .mmcl-index beside local shards)")
    index.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    index.add_argument("--hash", action="store_true", help="also the sha256 of every shard, which reads all of it")
    index.set_defaults(command="data index", overridable=False)

    check = actions.add_parser("check", help="decode everything and list what is damaged; exit status 1 if anything is")
    _add_shards(check)
    check.set_defaults(command="data check", overridable=False)

    stats = actions.add_parser("stats", help="count what shards hold: modalities, sizes, durations, words, duplicates")
    _add_shards(stats)
    stats.add_argument("--json", type=Path, help="also write all of it to this file")
    stats.add_argument("--tokens", type=int, help="also count tokens of captions, and which are cut at this length")
    stats.set_defaults(command="data stats", overridable=False)

    preview = actions.add_parser("preview", help="one HTML page with samples to look at and listen to")
    _add_shards(preview, parallel=False)
    preview.add_argument("--out", type=Path, required=True, help="the page; one that is there is replaced")
    preview.add_argument("--samples", type=int, default=48, help="drawn evenly from all shards (default: 48)")
    preview.add_argument("--seed", type=int, default=0, help="decides which (default: 0)")
    preview.add_argument("--seconds", type=float, default=10.0, help="of a sound at most (default: 10)")
    preview.set_defaults(command="data preview", overridable=False)


def _add_corpora(corpora: Any) -> None:
    for name, corpus in CORPORA.items():
        what = " ".join((corpus.__doc__ or "").partition("\n\n")[0].split())
        parser = corpora.add_parser(name, help=what, description=what)
        root = "the folder of the corpus; nothing outside of it is read"
        parser.add_argument("--root", type=Path, required=name != "manifest", help=root)
        parser.add_argument("--out", type=Path, required=True, help="new directory, or that of a build to go on with")
        for field in dataclasses.fields(corpus):
            kind, needed = _switch if field.type is bool else field.type, field.default is dataclasses.MISSING
            settings: dict[str, Any] = {"required": True} if needed else {"default": field.default}
            settings["help"] = field_docs(corpus)[field.name].replace("%", "%%")
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, **settings)
        for field in dataclasses.fields(Options):
            doc = f"{field_docs(Options)[field.name]} (default: {field.default})"
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help=doc)
        parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
        part = "build every N-th shard, from the I-th (default: 1/1)"
        parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help=part)
        parser.set_defaults(command="data build", overridable=False)
    adopted = corpora.add_parser("img2dataset", help="look through img2dataset's shards, which stay as they are")
    adopted.add_argument("--root", type=Path, required=True, help="where its tars are; manifest.json is written beside")
    adopted.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    adopted.set_defaults(command="data build img2dataset", overridable=False)


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 1 to N, like 3/8")
    return int(number), int(of)


def _add_shards(parser: argparse.ArgumentParser, *, parallel: bool = True) -> None:
    parser.add_argument("shards", nargs="+", help="tar, directory, glob or brace pattern, each a source of its own")
    if parallel:
        parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")


def _add_show(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the resolved config of a run", epilog=FIELDS)
    _add_config(show)
    show.set_defaults(command="config show", overridable=True)
    fields = actions.add_parser("fields", help="list every field with its default and meaning")
    fields.set_defaults(command="config fields", overridable=False)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", required=True, help="recipe names or YAML files; later ones are merged over earlier ones"
    )


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, do nothing")


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return text.lower() == "true"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 problems in data, 2 an error that was explained."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and not (args.overridable and rest[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return run(args, rest)
    except MmclError as error:
        print(f"mmcl: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run a parsed command."""
    _check_given(args)
    from mmcl.metrics import console

    console(sys.stderr)
    from mmcl_launch import commands, demo

    known: dict[str, Any] = {
        "data world": commands.data_world,
        "data build tuxpaint": commands.data_build_tuxpaint,
        "data build img2dataset": commands.data_build_img2dataset,
        "data build": commands.data_build,
        "data check": commands.data_check,
        "data stats": commands.data_stats,
        "data preview": commands.data_preview,
        "data index": commands.data_index,
        "train": commands.train,
        "eval": commands.evaluate,
        "export": commands.export,
        "config show": commands.config_show,
        "config fields": commands.config_fields,
        "demo": demo.demo,
    }
    return known[args.command](args, overrides)


def _check_given(args: argparse.Namespace) -> None:
    if getattr(args, "nproc", 1) < 1:
        raise ConfigError(f"--nproc {args.nproc}: at least one rank is needed")


logging.getLogger("mmcl").addHandler(logging.NullHandler())

if __name__ == "__main__":
    sys.exit(main())
