"""Rows of CSV, TSV, JSONL and Parquet, each with its place in the table; a malformed row is a place and a reason."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mmcl.errors import ConfigError, DataError, MissingExtra
from mmcl_data.build.items import Skipped, plain

MAX_LINE = 2**20
"""Characters of one line of JSONL."""
MAX_CELL = 2**16
"""Bytes a row on average of a column of Parquet that is read: no path, caption or key is larger."""
MAX_BATCH = 2**26
"""Bytes of the rows of Parquet that are held at once."""


class Row(NamedTuple):
    """One row."""

    number: int
    """Of its line in the file; of the row in Parquet."""
    where: str
    """As a person finds it."""
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is read once, from front to back."""

    columns: list[str]
    rows: Iterator[Row | Skipped]


def open_table(path: Path, *, quotes: bool = True, required: Iterable[str] = ()) -> Table:
    """The table at `path`, of the kind that its extension says.

    Args:
        quotes: whether `"` quotes in CSV and TSV; if not, it is a character.
        required: columns that must be there.

    Raises:
        ConfigError: of another kind.
        DataError: it is missing or empty, not a table, or lacks a column.
        MissingExtra: Parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if kind not in _KINDS:
        raise ConfigError(f"{path}: a table is one of {', '.join(_KINDS)}")
    if not path.is_file():
        raise DataError(f"{path} is missing")
    table = _KINDS[kind](path, quotes)
    if missing := [name for name in required if name not in table.columns]:
        raise DataError(f"{path}: no column {missing[0]!r}; the table has {', '.join(table.columns)}")
    return table


def _delimited(path: Path, quotes: bool, delimiter: str) -> Table:
    rows = _lines(path, delimiter, quotes)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if not header or len(set(header)) < len(header):
        raise DataError(f"{path}: expected a first line that names each column once, found {header}")
    return Table(header, _cells(path, header, rows))


def _lines(path: Path, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    # what is not UTF-8 is told row by row, so that one does not cost the table
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, begun = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True), 1
        try:
            for fields in reader:
                if fields:
                    yield begun, fields
                begun = reader.line_num + 1
        except csv.Error as error:
            hint = "; if quotes are plain characters here, say --quotes false" if quotes else ""
            raise DataError(f"{path}: line {begun} is malformed: {error}{hint}") from error


def _cells(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row | Skipped]:
    for number, fields in rows:
        where = f"{path.name} line {number}"
        if len(fields) != len(header):
            yield Skipped(where, f"{len(fields)} fields, where the header has {len(header)}")
        elif not all(cell.isascii() or _is_utf8(cell) for cell in fields):
            yield Skipped(where, "not UTF-8")
        else:
            yield Row(number, where, dict(zip(header, fields, strict=True)))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _jsonl(path: Path, _: bool) -> Table:
    rows = _objects(path)
    first = next(rows, None)
    skipped = []
    while isinstance(first, Skipped) and len(skipped) < 100:
        skipped.append(first)
        first = next(rows, None)
    if not isinstance(first, Row):
        raise DataError(f"{path}: no line holds a JSON object")
    return Table(list(first.cells), chain(skipped, [first], rows))


def _objects(path: Path) -> Iterator[Row | Skipped]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number, where = number + 1, f"{path.name} line {number + 1}"
            if len(line) > MAX_LINE:
                raise DataError(f"{path}: line {number} is over the limit of {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Skipped(where, f"not JSON: {error}")
                continue
            yield (
                Row(number, where, plain(cells))
                if isinstance(cells, dict)
                else Skipped(where, f"a {type(cells).__name__}, not an object")
            )


def _parquet(path: Path, _: bool) -> Table:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "Reading Parquet") from error
    try:
        file = ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # or else a group of rows is read at once
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    return Table(list(file.schema_arrow.names), _batches(path, file))


def _batches(path: Path, file: Any) -> Iterator[Row]:
    """Rows in which the cells of large columns, like embedded pictures, are empty bytes: they are not read."""
    import pyarrow

    names = list(file.schema_arrow.names)
    sizes = [_sizes(file.metadata.row_group(group), names) for group in range(file.num_row_groups)]
    large: dict[str, Any] = {name: b"" for name in names if any(size[name] > MAX_CELL for size in sizes)}
    small = [name for name in names if name not in large]
    number = 0
    try:
        for group, size in enumerate(sizes):
            most = max(1, min(1000, int(MAX_BATCH / max(1, sum(size[name] for name in small)))))
            for batch in file.iter_batches(most, row_groups=[group], columns=small):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{path.name} row {number}", cells | large)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: row {number + 1} and what follows cannot be read: {error}") from error


def _sizes(group: Any, names: list[str]) -> dict[str, float]:
    """Bytes of each column of a group of rows, a row on average."""
    sizes = dict.fromkeys(["", *names], 0.0)
    for number in range(group.num_columns):
        leaf = group.column(number)  # `picture.bytes` of the column `picture`; names may hold dots themselves
        of = max((name for name in names if f"{leaf.path_in_schema}.".startswith(f"{name}.")), key=len, default="")
        sizes[of] += leaf.total_uncompressed_size / max(1, group.num_rows)
    return sizes


_KINDS = {
    ".csv": lambda path, quotes: _delimited(path, quotes, ","),
    ".tsv": lambda path, quotes: _delimited(path, quotes, "\t"),
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
