"""A corpus on disk to shards: planned, packed in processes, gone on with after a kill, and summed up at the end.

    out/000000.tar ...             000000_001.tar ... where a shard would be too large
    out/manifest.json              written last: a build without it is not whole
    out/classnames.txt, zeroshot_classification_templates.txt, test/
                                   of labelled sets, CLIP_benchmark's layout; test/0.tar ... are links to the shards
    out/.parts/                    while it is built: whose build it is, and a report a shard

Nothing depends on how many processes pack, in how many parts, or on how often it was killed: one corpus, one set of
arguments and one version of the libraries give one set of bytes. A file that crashes its decoder is left out: by the
same start if other processes pack, and by the next one if this process does.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError, NoUsableSamples
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.manifest import read_json, sum_up, write_classes
from mmcl_data.build.one_by_one import pack_one_by_one
from mmcl_data.build.pack import Job, Report, pack_shard, read_report, write_json
from mmcl_data.build.plan import Options, Plan, make_plan
from mmcl_data.sweep import over_shards

log = logging.getLogger("mmcl.data")

MANIFEST, PARTS = "manifest.json", ".parts"
_ENOUGH = 100
"""Items of a first shard that, if none of them is any good, speak for all."""


def build_corpus(
    name: str,
    corpus: Corpus,
    root: Path,
    out: Path,
    *,
    options: Options | None = None,
    part: tuple[int, int] = (1, 1),
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Build the shards of `part`, and the manifest if they are the last that were missing.

    Args:
        name: of the corpus, for the manifest.
        corpus: what reads it.
        root: where it is.
        out: a new folder, or that of a build of the same corpus with the same arguments, which goes on.
        options: how it is cut into shards.
        part: number from 1, and of how many: every so many-th shard from that one on.
        workers: processes.
        progress: is told how many items of this part are done, and of how many.

    Returns what manifest.json holds; `{"parts_missing": shards that other parts have to build}` if there are any.

    Raises:
        ConfigError: arguments that make no sense or are not those of the build in `out`, or `out` is something else.
        NoUsableSamples: none at all, or a hundred of which none is any good; the first reasons are named.
        DataError: a table is malformed, or a shard cannot be written.
    """
    options = options or Options()
    if not root.is_dir():
        raise NoUsableSamples(f"{root}: there is no such folder: name with --root where the corpus is")
    if not 1 <= part[0] <= part[1]:
        raise ConfigError(f"part {part[0]}/{part[1]}: expected a part from 1 to the number of parts")
    arguments = {"corpus": name, **asdict(corpus), **asdict(options)}
    _check_free(out)

    def build() -> dict[str, Any]:
        with _staging(out) as folder:
            plan = make_plan(corpus, root, folder, options, arguments)
            if not plan.items:
                raise NoUsableSamples(f"{root}: no sample of {name} there{_reasons(plan.skipped)}")
            if (found := _claim(out, plan, arguments)) is not None:
                return found
            job = Job(corpus=corpus, root=root, out=out, plan=plan, max_bytes=options.max_shard_mb * 2**20)
            _pack(job, range(part[0] - 1, plan.shards, part[1]), workers, progress)
            return _finish(job, arguments)

    try:
        return build()
    except FileNotFoundError:
        if not (out / MANIFEST).exists():
            raise
        return build()  # the last part was quicker and took the staging of this one along: now all is there


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder of this process; what is whole is renamed from there."""
    if (out / MANIFEST).exists():  # nothing will be
        with tempfile.TemporaryDirectory(prefix="mmcl-plan-") as folder:
            yield Path(folder)
        shutil.rmtree(out / PARTS, ignore_errors=True)  # of a build that was killed right at its end
        return
    parts = out / PARTS
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to: {error.strerror}") from error
    try:
        with tempfile.TemporaryDirectory(prefix="plan-", dir=parts, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        if (out / MANIFEST).exists():
            shutil.rmtree(parts, ignore_errors=True)
        with suppress(OSError):  # others are at work there
            parts.rmdir()


def _check_free(out: Path) -> None:
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or (names and not {PARTS, MANIFEST} & {*names}):
        raise ConfigError(f"{out} exists and is not empty: name a new folder or remove it; shards are not overwritten")


def _claim(out: Path, plan: Plan, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Make `out` the place of this build, or find that it is; the manifest if it is whole."""
    mine = {"fingerprint": plan.fingerprint, "items": plan.items, "arguments": arguments}
    place = out / PARTS / "build.json"
    if (whole := read_json(out / MANIFEST)) is not None:
        _check_same(out, whole, mine)
        return whole
    write_json(plan.folder / "build.json", mine, plan.folder)
    try:
        os.link(plan.folder / "build.json", place)  # of parts that start together, one is first
    except FileExistsError:
        _check_same(out, read_json(place) or {}, mine)
    return None


def _check_same(out: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    if theirs.get("fingerprint") == mine["fingerprint"]:
        return
    old, new = theirs.get("arguments", {}), mine["arguments"]
    changed = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in new if old.get(name) != new[name]]
    if not changed:
        changed = [
            f"the corpus has changed: it had {theirs.get('items')} items in another listing, has {mine['items']}"
        ]
    raise ConfigError(f"{out} holds another build: {'; '.join(changed)}. Name a new folder, or remove it to begin anew")


def _pack(job: Job, shards: Sequence[int], workers: int, progress: Callable[[int, int], None]) -> None:
    left = [number for number in shards if not _is_built(job, number)]
    total = sum(map(job.plan.items_of, shards))
    done = total - sum(map(job.plan.items_of, left))
    progress(done, total)
    good = done
    for name, report in _reports(job, [f"{number:06d}" for number in left], workers):
        done, good = done + report.items, good + report.samples
        progress(done, total)
        if not good and done >= _ENOUGH:
            (job.reports / f"{name}.json").unlink(missing_ok=True)
            raise NoUsableSamples(f"{job.root}: of {done} samples none is any good{_reasons(report.skipped)}")


def _reports(job: Job, names: Sequence[str], workers: int) -> Iterator[tuple[str, Report]]:
    """Pack shards; first those over which an earlier start died."""
    died = [name for name in names if job.begun(name).exists()]
    fresh = [name for name in names if name not in {*died}]
    for name in died:
        yield name, _packed_again(job, name)
    for name, found in zip(fresh, over_shards(partial(pack_shard, job), fresh, workers), strict=True):
        yield name, found if isinstance(found, Report) else _packed_again(job, name)


def _packed_again(job: Job, name: str) -> Report:
    log.warning("%s: a process died while it packed shard %s, which is packed again, item by item", job.out, name)
    return pack_one_by_one(job, name)


def _is_built(job: Job, number: int) -> bool:
    """Whether a report is there and the shards that it tells of."""
    try:
        report = read_report(job.reports / f"{number:06d}.json")
        return all((job.out / shard["name"]).stat().st_size == shard["bytes"] for shard in report.shards)
    except (OSError, ValueError, TypeError):
        return False


def _finish(job: Job, arguments: dict[str, Any]) -> dict[str, Any]:
    """Whoever finds all reports sums them up; that two do it at once makes no difference."""
    reports: list[Report] = []
    missing = 0
    for number in range(job.plan.shards):
        try:
            reports.append(read_report(job.reports / f"{number:06d}.json"))
        except FileNotFoundError:
            missing += 1
    if missing:
        return read_json(job.out / MANIFEST) or {"parts_missing": missing}
    if not any(report.samples for report in reports):
        shutil.rmtree(job.reports, ignore_errors=True)
        reasons = [reason for report in reports for reason in report.skipped]
        raise NoUsableSamples(f"{job.root}: of {job.plan.items} samples none is any good{_reasons(reasons)}")
    manifest = {"fingerprint": job.plan.fingerprint, "items": job.plan.items, "arguments": arguments}
    manifest |= sum_up(reports, job.plan.skipped)
    if names := job.corpus.classes(job.root):
        write_classes(job.out, names, [shard["name"] for shard in manifest["shards"]])
    write_json(job.out / MANIFEST, manifest, job.plan.folder, indent=1)
    return manifest


def _reasons(skipped: Sequence[tuple[str, str]]) -> str:
    return "".join(f"; {where}: {why}" for where, why in skipped[:3])
