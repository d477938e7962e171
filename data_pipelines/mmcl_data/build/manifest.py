"""What a build says of itself when it is whole: counts, shards, what was left out, and what is there twice."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mmcl.errors import DataError
from mmcl_data.build.pack import Report

LISTED = 100
"""At most so many of what was left out, and of duplicates, are named; all are counted."""

TEMPLATES = ("{c}", "a photo of a {c}.", "the sound of {c}.")


def sum_up(reports: Sequence[Report], skipped: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Counts, shards with their sha256, duplicates and what was left out, of all reports in order."""
    kinds = sum((Counter(report.kinds) for report in reports), Counter[str]())
    left_out = [*skipped, *chain.from_iterable(report.skipped for report in reports)]
    samples = sum(report.samples for report in reports)
    return {
        "counts": {"samples": samples, **dict(sorted(kinds.items())), "skipped": len(left_out)},
        "shards": [shard for report in reports for shard in report.shards],
        "duplicates": {kind: _duplicates(kind, reports) for kind in ("image", "audio") if kinds[kind]},
        "skipped": [list(entry) for entry in left_out[:LISTED]],
    }


def _duplicates(kind: str, reports: Sequence[Report]) -> dict[str, Any]:
    """Samples whose pictures or sounds are the same bytes: groups, how many could go, and keys of the first groups."""
    seen = Counter(bytes.fromhex(digest) for report in reports for _, of, digest in report.hashes if of == kind)
    twice = {digest: count for digest, count in seen.items() if count > 1}
    keys: dict[bytes, list[str]] = {digest: [] for digest in list(twice)[:LISTED]}
    for key, _, digest in chain.from_iterable(report.hashes for report in reports):
        if (group := keys.get(bytes.fromhex(digest))) is not None and len(group) < LISTED:
            group.append(key)
    return {"groups": len(twice), "surplus": sum(twice.values()) - len(twice), "keys": list(keys.values())}


def write_classes(out: Path, names: Sequence[str], shards: Iterable[str]) -> None:
    """Make `out` a labelled set that `read_classes` reads, with links to the shards."""
    test = out / "test"
    test.mkdir(exist_ok=True)
    count = 0
    for count, shard in enumerate(shards, 1):
        try:
            (test / f"{count - 1}.tar").symlink_to(f"../{shard}")
        except FileExistsError:  # another part does the same
            continue
    _write_lines(test / "nshards.txt", [str(count)])
    _write_lines(out / "classnames.txt", names)
    _write_lines(out / "zeroshot_classification_templates.txt", TEMPLATES)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no file.

    Raises:
        DataError: it holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not an object")
    return found
