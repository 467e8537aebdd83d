"""Tables of scored rows as CSV, JSON Lines or Parquet, written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

Entries = Iterable[dict[str, Any]]

COLUMNS = ("rank", "line", "share", "drop", "loss", "loss_with_vectors", "prompt", "answer", "row")
"""What a table holds; `row` is the original row, in CSV and Parquet as JSON text."""

_BATCH = 1024


def check_output(path: str | Path) -> Path:
    """Return the path if a table can be written to it.

    Raises:
        ValueError: If its name ends in something else than `.csv`, `.jsonl` or `.parquet`.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"`output` must end in one of {', '.join(_WRITERS)}, got `{path}`.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for `output`. Make it first.")
    return path


def write_table(path: Path, entries: Entries) -> Path:
    """Write a table under its name once all of it is written; a file of that name is untouched until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _WRITERS[path.suffix.lower()](temporary, entries)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


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
        while batch := [_flat(entry) for entry in islice(entries, _BATCH)]:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    row = json.dumps(entry["row"], ensure_ascii=False)
    return {**entry, "row": row.encode("utf-8", "replace").decode()}


_WRITERS: dict[str, Callable[[Path, Entries], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
