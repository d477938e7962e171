"""What img2dataset wrote in its webdataset format is shards already: looked through, not rewritten.

    NNNNN.tar            shards: jpg, txt, json
    NNNNN_stats.json     written after its tar is whole: successes, failures by reason
    NNNNN.parquet        the table of the shard, which nothing reads here

Its `files` format is read by the corpus `folder`.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError, DataError, ShardMissing
from mmcl_data.blobs import Blobs
from mmcl_data.build.manifest import read_json, sum_up
from mmcl_data.build.pack import Report, write_json
from mmcl_data.build.shards import describe_shard
from mmcl_data.scan import read_sample, scan_shard
from mmcl_data.sweep import over_shards


def adopt_img2dataset(
    root: Path, *, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write and return `root/manifest.json` for the shards there, which stay as they are.

    Raises:
        ShardMissing: there are none.
        ConfigError: it is img2dataset's `files` format.
        DataError: a shard is damaged, has no statistics or another number of samples than they say; all are named.
    """
    shards = sorted(str(path) for path in root.glob("*.tar"))
    if not shards:
        if any(root.glob("*_stats.json")):
            raise ConfigError(
                f"{root} is of img2dataset's `files` format: mmcl data build folder --root {root} --out DIR"
            )
        raise ShardMissing(f"{root}: no *.tar there, as img2dataset writes them with --output_format webdataset")
    found = list(over_shards(_look_through, shards, workers, progress))
    problems = [result for result in found if not isinstance(result, tuple)]
    if problems:
        named = "; ".join(str(problem) for problem in problems[:5])
        remedy = "img2dataset writes them anew if it is started once more with --incremental_mode incremental"
        raise DataError(f"{len(problems)} of {len(shards)} shards are not whole: {named}. {remedy}")
    whole = [result for result in found if isinstance(result, tuple)]
    statuses = sum((Counter(status) for _, status in whole), Counter[str]())
    manifest = {"arguments": {"corpus": "img2dataset"}, **sum_up([report for report, _ in whole])}
    manifest["downloads"] = dict(sorted(statuses.items()))
    with tempfile.TemporaryDirectory(prefix=".manifest-", dir=root) as staging:
        write_json(root / "manifest.json", manifest, Path(staging), indent=1)
    return manifest


def _look_through(shard: str) -> tuple[Report, dict[str, int]] | DataError:
    path, report, blobs = Path(shard), Report(), Blobs()
    try:
        stats = read_json(path.with_name(f"{path.stem}_stats.json"))
        if stats is None:
            return DataError(f"{path} has no {path.stem}_stats.json")
        scan = scan_shard(path)
        for sample in scan.samples:
            report.count(sample.key, read_sample(blobs, shard, sample))
    except DataError as error:
        return error
    if stats.get("successes") != len(scan.samples):
        return DataError(f"{path} holds {len(scan.samples)} samples, its statistics say {stats.get('successes')}")
    report.shards.append(asdict(describe_shard(path, len(scan.samples))))
    return report, stats.get("status_dict", {})
