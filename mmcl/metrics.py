"""What a run says about itself: one JSON object a line in `metrics.jsonl`, and lines or a bar for a person."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger("mmcl")


class MetricsFile:
    """Appends to `metrics.jsonl`, a line at a time; on ranks above 0 it writes nothing."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled

    def rewind(self, step: int) -> None:
        """Drop lines after `step`, and a last line that a crash cut off: a resumed run writes them again."""
        if not self.enabled or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        staged = self.path.with_name(f".{self.path.name}.tmp")
        staged.write_text("".join(kept))
        staged.replace(self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. Values that are no finite number become null: the file is strict JSON."""
        if self.enabled:
            line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


class Progress:
    """A bar on a terminal, one plain line every few seconds elsewhere, nothing on ranks above 0."""

    def __init__(self, what: str, total: int, *, enabled: bool = True, start: int = 0, every_s: float = 5.0) -> None:
        self.what, self.total, self.enabled, self.every_s = what, total, enabled, every_s
        self.start, self.began, self.said = start, time.monotonic(), time.monotonic()
        # disable=None: tqdm draws only on a terminal
        self.bar = tqdm(total=total, initial=start, desc=what, unit="", disable=None if enabled else True, leave=False)

    def update(self, done: int, note: str = "") -> None:
        """Now `done` of the total are done."""
        self.bar.update(done - self.bar.n if not self.bar.disable else 0)
        if note and not self.bar.disable:
            self.bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if self.enabled and self.bar.disable and (now - self.said >= self.every_s or done == self.total):
            self.said = now
            rate = (done - self.start) / max(1e-9, now - self.began)
            left = (self.total - done) / rate if rate else math.inf
            speed = f", {rate:.{0 if rate >= 100 else 2}f}/s" if rate else ""
            eta = f", {left:.0f} s left" if math.isfinite(left) and done < self.total else ""
            log.info("%s %d/%d%s%s%s", self.what, done, self.total, speed, eta, f"  {note}" if note else "")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


def console(stream: TextIO, level: int = logging.INFO) -> None:
    """Send mmcl's log to `stream`, one plain line a message."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
