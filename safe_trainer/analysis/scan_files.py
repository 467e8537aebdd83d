"""A scan's files: scores kept while they are made, tables of ranked rows, and the rows that are kept."""

from __future__ import annotations

import csv
import gzip
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..data import ReadOptions, Record, encoding_of, hub_dataset, kind_of, open_source, read_records

COLUMNS = ("rank", "line", "share", "drop", "loss", "loss_with_vectors", "prompt", "answer", "row")
"""What a table holds; `row` is the original row, in CSV and Parquet as JSON text."""

Entries = Iterable[dict[str, Any]]


class Spool:
    """Scored rows on disk, in the order in which they came, to be read back from the highest share to the lowest.

    In memory are 25 bytes for each: its share, line and label, and where it is in the file.

    Args:
        path (`Path`, *optional*): A file that outlives the process, so that a scan can continue; left out, a temporary
            one.
        fingerprint (`str`, *optional*): What decides on the scores; a file with another one starts anew.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._path = path
        self._file: IO[bytes] = TemporaryFile() if path is None else path.open("a+b")
        self._shares, self._places, self._lines, self._labels = array("d"), array("q"), array("q"), array("b")
        self.unscored = array("q")
        """Lines of the rows that have no score."""
        self._file.seek(0)
        header = fingerprint.encode() + b"\n"
        if self._file.readline() != header:
            self._file.truncate(0)
            self._file.write(header)
        while (line := self._file.readline()).endswith(b"\n"):
            self._index(json.loads(line.decode("utf-8", "surrogatepass")), self._file.tell() - len(line))
        self._file.truncate(self._file.tell() - len(line))  # a line that was being written when the process was killed

    def __enter__(self) -> Spool:
        """Return itself; the file is closed when the context ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; a temporary one is gone then."""
        self._file.close()

    def __len__(self) -> int:
        """Return the number of rows with a score."""
        return len(self._shares)

    @property
    def done(self) -> int:
        """How many rows there are, with a score or without."""
        return len(self._shares) + len(self.unscored)

    def add(self, share: float | None, is_harmful: bool | None, entry: dict[str, Any]) -> None:
        """Keep a row; values that JSON does not know, such as dates, are kept as text."""
        entry = {"scored": share, "harmful": is_harmful, **entry}
        encoded = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(encoded)
        self._file.flush()
        self._index(entry, place)

    def discard(self) -> None:
        """Remove the file: nothing is left to continue."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def shares(self) -> NDArray[np.float64]:
        """Return the shares, in the order in which they came."""
        return np.array(self._shares)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Return the lines of the same rows."""
        return np.array(self._lines)

    @property
    def labels(self) -> NDArray[np.int8]:
        """Return the labels of the same rows: 1 for harmful, 0 for safe, -1 where there is none."""
        return np.array(self._labels)

    def ranked(self) -> Iterator[dict[str, Any]]:
        """Yield the entries from the highest share to the lowest, each with its `rank` from 1."""
        for rank, index in enumerate(np.argsort(-self.shares, kind="stable"), 1):
            self._file.seek(self._places[index])
            entry = json.loads(self._file.readline().decode("utf-8", "surrogatepass"))
            yield {"rank": rank, **{name: entry[name] for name in entry if name not in ("scored", "harmful")}}

    def _index(self, entry: dict[str, Any], place: int) -> None:
        if entry["scored"] is None:
            self.unscored.append(entry["line"])
            return
        self._shares.append(entry["scored"])
        self._places.append(place)
        self._lines.append(entry.get("line", 0))
        self._labels.append(-1 if entry["harmful"] is None else entry["harmful"])


def check_output(path: str | Path | None) -> Path | None:
    """Return the path if a table can be written to it.

    Raises:
        ValueError: If its name ends in something else than `.csv`, `.jsonl` or `.parquet`.
        FileNotFoundError: If its folder does not exist.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"`output` must end in one of {', '.join(_WRITERS)}, got `{path}`.")
    _check_folder("output", path)
    return path


def check_clean(path: str | Path | None, rows: Any) -> Path | None:
    """Return the path if the rows that are kept can be written to it; errors as in [`check_output`]."""
    if path is None:
        return None
    path = Path(path)
    source = file_of(rows) or Path("rows.jsonl")
    compressed = [one.suffix.lower() == ".gz" for one in (source, path)]
    if kind_of(source) != kind_of(path) or compressed[0] != compressed[1]:
        kind = f"{kind_of(source)}{', gzipped' if compressed[0] else ''}"
        raise ValueError(f"`clean` must be of the kind of the rows ({kind}, as in `{source.name}`), got `{path}`.")
    if path.resolve() == source.resolve():
        raise ValueError(f"`clean` would overwrite the rows in `{path}`. Give another file.")
    _check_folder("clean", path)
    return path


def write_table(path: Path, entries: Entries) -> Path:
    """Write a table under its name once all of it is written; a file of that name is untouched until then."""
    with _replacing(path) as temporary:
        _WRITERS[path.suffix.lower()](temporary, entries)
    return path


def write_clean(path: Path, rows: Any, options: ReadOptions, dropped: set[int]) -> Path:
    """Write all records of a source but those at some lines (or of some numbers), in its own format."""
    source = file_of(rows)
    with _replacing(path) as temporary:
        if source is not None and kind_of(source) == "Parquet":
            _copy_parquet(source, temporary, dropped)
            return path
        records = open_source(rows, options=options).records
        first = next(records)
        if source is not None and first.unit == "line":
            _copy_lines(source, temporary, options, dropped)
            return path
        values = (
            record.value
            for record in chain([first], records)
            if isinstance(record, Record) and record.line not in dropped
        )
        before, between, after = ("[\n", ",\n", "\n]\n") if kind_of(path) == "JSON" else ("", "\n", "\n")
        with _opened(temporary, path, "wt", encoding="utf-8", errors="surrogateescape") as file:
            for number, value in enumerate(values):
                file.write((between if number else before) + json.dumps(value, ensure_ascii=False, default=str))
            file.write(after)
    return path


def file_of(rows: Any) -> Path | None:
    """Return the file that rows are in; `None` for rows in memory or on the Hub."""
    is_file = isinstance(rows, str | Path) and hub_dataset(rows) is None
    return Path(rows) if is_file else None


def _copy_lines(path: Path, target: Path, options: ReadOptions, dropped: set[int]) -> None:
    """Copy a text file without the lines of some records, each of which reaches to where the next one begins."""
    with _opened(path, path, "rb") as file:
        encoding = options.encoding or encoding_of(file.read(4))
    how: dict[str, Any] = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}
    starts = (record.line for record in read_records(path, options.encoding, options.has_header))
    is_kept, following = True, next(starts, 0)
    with _opened(path, path, "rt", **how) as file, _opened(target, path, "wt", **how) as out:
        for number, line in enumerate(file, 1):
            while following and number >= following:
                is_kept, following = following not in dropped, next(starts, 0)
            if is_kept:
                out.write(line)


def _copy_parquet(path: Path, target: Path, dropped: set[int]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    with _opened(path, path, "rb") as stream, _opened(target, path, "wb") as out:
        file = parquet.ParquetFile(pa.BufferReader(stream.read()) if path.suffix.lower() == ".gz" else stream)
        with parquet.ParquetWriter(out, file.schema_arrow) as writer:
            for batch in file.iter_batches():
                writer.write_batch(batch.filter(pa.array(row + i + 1 not in dropped for i in range(len(batch)))))
                row += len(batch)


def _opened(file: Path, named_as: Path, mode: str, **how: Any) -> Any:
    return (gzip.open if named_as.suffix.lower() == ".gz" else open)(file, mode, **how)


def _check_folder(argument: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for `{argument}`. Make it first.")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name, which becomes the path once all is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json_lines(path: Path, entries: Entries) -> None:
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_csv(path: Path, entries: Entries) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_flat, entries))


def _write_parquet(path: Path, entries: Entries) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kinds = {"rank": pa.int64(), "line": pa.int64(), "share": pa.float64(), "drop": pa.float64()}
    kinds |= {"loss": pa.float64(), "loss_with_vectors": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    entries = iter(entries)
    with ParquetWriter(path, schema) as writer:
        while batch := [_flat(entry) for entry in islice(entries, 1024)]:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    row = json.dumps(entry["row"], ensure_ascii=False)
    return {**entry, "row": row.encode("utf-8", "replace").decode()}


_WRITERS: dict[str, Callable[[Path, Entries], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
