"""A scan's files: scores kept while they are made, tables of ranked rows, and the rows that are kept."""

from __future__ import annotations

import gzip
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import ReadOptions, Record, encoding_of, hub_dataset, kind_of, open_source, read_records
from ..evaluation.report import replacing

_TABLES = (".csv", ".jsonl", ".parquet")


class Scores:
    """Scored rows in an SQLite file, so that a scan can continue in another process; without a path, a temporary one.

    `fingerprint` is what the scores depend on: a file with another one is started again.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._db = sqlite3.connect(path or "")
        self._db.execute("PRAGMA synchronous = OFF")  # it need not survive a power cut
        self._db.execute("CREATE TABLE IF NOT EXISTS source (fingerprint TEXT)")
        self._db.execute("CREATE TABLE IF NOT EXISTS rows (line INTEGER, share REAL, harmful INTEGER, entry BLOB)")
        if self._db.execute("SELECT * FROM source").fetchall() != [(fingerprint,)]:
            self._db.executescript("DELETE FROM source; DELETE FROM rows")
            self._db.execute("INSERT INTO source VALUES (?)", (fingerprint,))
            self._db.commit()

        self.close = self._db.close

    def __len__(self) -> int:
        """Return how many rows there are, with a score or without."""
        return int(self._db.execute("SELECT count(*) FROM rows").fetchone()[0])

    def add(self, line: int, share: float | None, is_harmful: bool | None, entry: dict[str, Any]) -> None:
        """Keep a row; values that JSON does not know, such as dates, are kept as text."""
        text = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        self._db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (line, share, is_harmful, text))
        self._db.commit()

    def shares(self) -> NDArray[Any]:
        """Return `share` and `harmful` (-1 where there is no label) of the rows with a score, in their order."""
        found = self._db.execute("SELECT share, coalesce(harmful, -1) FROM rows WHERE share NOT NULL ORDER BY rowid")
        return np.fromiter(found, [("share", float), ("harmful", int)])

    def lines(self, condition: str, *values: float) -> list[int]:
        """Return the lines of the rows that meet a condition in SQL."""
        return [line for (line,) in self._db.execute(f"SELECT line FROM rows WHERE {condition}", values)]

    def ranked(self) -> Iterator[dict[str, Any]]:
        """Yield the entries from the highest share to the lowest, each with its `rank` from 1."""
        found = self._db.execute("SELECT entry FROM rows WHERE share NOT NULL ORDER BY share DESC, rowid")
        for rank, (text,) in enumerate(found, 1):
            yield {"rank": rank, **json.loads(text.decode("utf-8", "surrogatepass"))}


def check_output(path: str | Path | None) -> Path | None:
    """Return the path of a table, after checking its suffix and folder."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"`output` must end in one of {', '.join(_TABLES)}, got `{path}`.")
    return _in_folder("output", path)


def check_clean(path: str | Path | None, rows: Any) -> Path | None:
    """Return the path of the kept rows, after checking its kind and folder."""
    if path is None:
        return None
    path, source = Path(path), file_of(rows) or Path("rows.jsonl")
    compressed = [one.suffix.lower() == ".gz" for one in (source, path)]
    if kind_of(source) != kind_of(path) or compressed[0] != compressed[1]:
        kind = f"{kind_of(source)}{', gzipped' if compressed[0] else ''}"
        raise ValueError(f"`clean` must be of the kind of the rows ({kind}, as in `{source.name}`), got `{path}`.")
    if path.resolve() == source.resolve():
        raise ValueError(f"`clean` would overwrite the rows in `{path}`. Give another file.")
    return _in_folder("clean", path)


def file_of(rows: Any) -> Path | None:
    """Return the file that rows are in; `None` for rows in memory or on the Hub."""
    return Path(rows) if isinstance(rows, str | Path) and hub_dataset(rows) is None else None


def write_table(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write a table by its suffix, under its name once all of it is written; `row` is JSON text in CSV and Parquet."""
    with replacing(path) as temporary:
        if path.suffix.lower() == ".jsonl":
            with temporary.open("w", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        else:
            _write_columns(temporary, path.suffix.lower() == ".csv", iter(entries))


def _write_columns(path: Path, is_csv: bool, entries: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow.csv import CSVWriter
    from pyarrow.parquet import ParquetWriter

    kinds = {
        pa.int64(): ("rank", "line"),
        pa.float64(): ("share", "drop", "loss", "loss_with_vectors"),
        pa.string(): ("prompt", "answer", "row"),
    }
    schema = pa.schema([(name, kind) for kind, names in kinds.items() for name in names])
    with (CSVWriter if is_csv else ParquetWriter)(str(path), schema) as table:
        while batch := list(islice(entries, 1024)):
            table.write_batch(pa.RecordBatch.from_pylist([_flat(entry) for entry in batch], schema))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    flat = entry | {"row": json.dumps(entry["row"], ensure_ascii=False)}
    # Without what UTF-8 cannot hold, such as half of a surrogate pair.
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in flat.items()}


def write_clean(path: Path, rows: Any, options: ReadOptions, dropped: set[int], last: float = math.inf) -> None:
    """Write the records of a source, up to a `last` line (or number), but those at some of them, in its own format."""
    source = file_of(rows)
    with replacing(path) as temporary:
        if source is not None and kind_of(source) == "Parquet":
            return _copy_parquet(source, temporary, dropped, last)
        records = open_source(rows, options=options).records
        first = next(records)
        if source is not None and first.unit == "line":
            return _copy_lines(source, temporary, options, dropped, last)
        seen = takewhile(lambda record: record.line <= last, chain([first], records))
        kept = (r.value for r in seen if isinstance(r, Record) and r.line not in dropped)
        before, between, after = ("[\n", ",\n", "\n]\n") if kind_of(path) == "JSON" else ("", "\n", "\n")
        with _opened(temporary, path, "wt", encoding="utf-8", errors="surrogateescape") as file:
            for number, value in enumerate(kept):
                file.write((between if number else before) + json.dumps(value, ensure_ascii=False, default=str))
            file.write(after)
    return None


def _copy_lines(path: Path, target: Path, options: ReadOptions, dropped: set[int], last: float) -> None:
    """Copy a text file without the lines of some records, each of which reaches to where the next one begins."""
    with _opened(path, path, "rb") as file:
        encoding = options.encoding or encoding_of(file.read(4))
    how: dict[str, Any] = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}
    starts = (record.line for record in read_records(path, options.encoding, options.has_header))
    is_kept, following = True, next(starts, 0)
    with _opened(path, path, "rt", **how) as file, _opened(target, path, "wt", **how) as out:
        for number, line in enumerate(file, 1):
            while following and number >= following:
                if following > last:
                    return
                is_kept, following = following not in dropped, next(starts, 0)
            if is_kept:
                out.write(line)


def _copy_parquet(path: Path, target: Path, dropped: set[int], last: float) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    with _opened(path, path, "rb") as stream, _opened(target, path, "wb") as out:
        file = parquet.ParquetFile(pa.BufferReader(stream.read()) if path.suffix.lower() == ".gz" else stream)
        with parquet.ParquetWriter(out, file.schema_arrow) as writer:
            for batch in file.iter_batches():
                numbers = range(row + 1, row + len(batch) + 1)
                writer.write_batch(batch.filter(pa.array(n <= last and n not in dropped for n in numbers)))
                row += len(batch)


def _opened(file: Path, named_as: Path, mode: str, **how: Any) -> Any:
    return (gzip.open if named_as.suffix.lower() == ".gz" else open)(file, mode, **how)


def _in_folder(argument: str, path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for `{argument}`. Make it first.")
    return path
