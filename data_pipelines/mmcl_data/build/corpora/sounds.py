"""Sounds with captions or events: AudioCaps, Clotho and the strong labels of AudioSet.

Of AudioCaps and AudioSet only tables are published; what was downloaded has no agreed names. The sound of a row is
therefore looked for, anywhere below the folder, by the names that the usual downloaders give.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError
from mmcl_data.build.corpora.folder import SOUNDS
from mmcl_data.build.corpora.labelled import check_template
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Item, Read, Skipped, inside, item_at, make_key, walk
from mmcl_data.build.tables import Row, open_table


@dataclass(frozen=True, kw_only=True)
class AudioCaps(Corpus):
    """AudioCaps: train.csv, val.csv or test.csv, and sounds named by their id of YouTube or of AudioCaps"""

    several = True

    csv: str
    """the table, as a path below --root"""
    audio: str = ""
    """folder of the sounds below --root (default: --root)"""

    def read(self, root: Path) -> Read:
        """One item a sound, with all its captions, in the order of the table."""
        required = ("audiocap_id", "youtube_id", "start_time", "caption")
        table = open_table(root / inside(root, self.csv, "--csv"), required=required)
        rows: dict[str, list[Row]] = {}
        for row in table.rows:
            if isinstance(row, Skipped):
                yield row
            else:
                rows.setdefault(f"{row.cells['youtube_id']}_{row.cells['start_time']}", []).append(row)
        sounds = _by_stem(root, self.audio)
        for clip, same in rows.items():
            first, numbers = same[0].cells, [row.cells["audiocap_id"] for row in same]
            facts = {"youtube_id": first["youtube_id"], "start_time": first["start_time"], "audiocap_ids": numbers}
            captions = tuple(row.cells["caption"] for row in same)
            yield _found(sounds, [clip, first["youtube_id"], *numbers], clip, captions, facts)


@dataclass(frozen=True, kw_only=True)
class Clotho(Corpus):
    """Clotho: clotho_captions_development.csv (or validation, evaluation) and the folder of its sounds"""

    several = True

    csv: str
    """the table, as a path below --root"""
    audio: str
    """folder of the sounds below --root"""

    def read(self, root: Path) -> Read:
        """The items in the order of the table, each with its five captions."""
        columns = [f"caption_{number}" for number in range(1, 6)]
        for row in open_table(root / inside(root, self.csv, "--csv"), required=("file_name", *columns)).rows:
            if isinstance(row, Skipped):
                yield row
                continue
            name = row.cells["file_name"]
            yield item_at(
                root,
                row.where,
                [f"{self.audio}/{name}"],
                key=make_key(name.rpartition(".")[0] or name),
                captions=tuple(row.cells[column] for column in columns),
                facts={"file": name},
            )


@dataclass(frozen=True, kw_only=True)
class AudioSetStrong(Corpus):
    """AudioSet with strong labels: a TSV of segment_id, start_time_seconds, end_time_seconds, label; clips kept whole

    The json holds `events`, each {"label", "start", "end"}, by their start. The caption is made of the labels, each
    named when it first begins: "Male speech, man speaking, then Bark".
    """

    tsv: str
    """audioset_train_strong.tsv or audioset_eval_strong.tsv, as a path below --root"""
    labels: str = ""
    """mid_to_display_name.tsv below --root, from /m/09x0r to names (default: labels are kept as they are)"""
    audio: str = ""
    """folder of the clips below --root (default: --root)"""
    caption_template: str = "{}"
    """caption, with {} for the labels"""

    def read(self, root: Path) -> Read:
        """One item a segment, in the order of their first rows."""
        check_template(self.caption_template)
        names = _names(root / inside(root, self.labels, "--labels")) if self.labels else {}
        required = ("segment_id", "start_time_seconds", "end_time_seconds", "label")
        table = open_table(root / inside(root, self.tsv, "--tsv"), quotes=False, required=required)
        segments: dict[str, list[dict[str, Any]]] = {}
        for row in table.rows:
            event = row if isinstance(row, Skipped) else _event(row, names)
            if isinstance(event, Skipped):
                yield event
            elif isinstance(row, Row):
                segments.setdefault(row.cells["segment_id"], []).append(event)
        sounds = _by_stem(root, self.audio)
        for segment, events in segments.items():
            events.sort(key=lambda event: (event["start"], event["end"], event["label"]))
            caption = self.caption_template.replace("{}", ", then ".join(dict.fromkeys(e["label"] for e in events)))
            yield _found(sounds, [segment, segment.rpartition("_")[0]], segment, (caption,), {"events": events})


def _event(row: Row, names: dict[str, str]) -> dict[str, Any] | Skipped:
    label = row.cells["label"]
    if names and label not in names:
        return Skipped(row.where, f"the label {label!r} has no name in the table of labels")
    try:
        start, end = (float(row.cells[f"{which}_time_seconds"]) for which in ("start", "end"))
    except ValueError as error:
        return Skipped(row.where, f"a time is no number: {error}")
    if not 0 <= start <= end < 1e6:
        return Skipped(row.where, f"from {start:g} to {end:g} seconds is no stretch of time")
    return {"label": names.get(label, label), "start": start, "end": end} | ({"mid": label} if names else {})


def _names(path: Path) -> dict[str, str]:
    """Names by mid; the published file has two columns and no header."""
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels {path}: {error}") from error
    if bad := [number for number, fields in enumerate(lines, 1) if len(fields) != 2]:
        raise ConfigError(f"--labels {path}: line {bad[0]}: expected a label and its name with a tab between")
    return dict(lines)  # pyright: ignore[reportArgumentType]


def _by_stem(root: Path, folder: str) -> dict[str, str]:
    """Sounds below a folder by their name without the extension; of two of one name, the first."""
    found: dict[str, str] = {}
    for name in walk(root / inside(root, folder, "--audio") if folder else root, root):
        stem, dotted = os.path.splitext(os.path.basename(name))
        if dotted[1:].lower() in SOUNDS:
            found.setdefault(stem, name)
    return found


def _found(
    sounds: dict[str, str], stems: Iterable[str], clip: str, captions: tuple[str, ...], facts: dict[str, Any]
) -> Item | Skipped:
    tried: Iterator[str] = chain.from_iterable((stem, f"Y{stem}") for stem in stems)
    name = next((sounds[stem] for stem in tried if stem in sounds), None)
    if name is None:
        return Skipped(clip, "no sound of that name")
    return Item(key=make_key(clip), files=(name,), captions=captions, facts=facts)
