"""What could not be used, for whoever mends the data."""

import json
import logging
from pathlib import Path

from mmcl_data.workers import Quarantined

log = logging.getLogger("mmcl.data")


class QuarantineFile:
    """Appends each sample that could not be used, once, to `quarantine.jsonl`, and says so in the log."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.written: set[tuple[int, int]] = set()

    def write(self, source: str, entry: Quarantined) -> None:
        """Note a sample of a source."""
        if (entry.source, entry.sample) in self.written:
            return
        self.written.add((entry.source, entry.sample))
        log.warning("left out: %s: sample %r: %s", entry.shard, entry.key, entry.cause)
        if self.path is not None:
            found = {"sample": entry.sample, "shard": entry.shard, "key": entry.key, "cause": entry.cause}
            with self.path.open("a") as file:
                file.write(json.dumps({"source": source} | found) + "\n")
