"""Where records come from: files of every common kind, also gzipped, and datasets on the Hub or in a folder."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .labels import named_classes, with_class_names
from .parsing import BrokenFileError, Notes, Record, Records, read_csv, read_json, read_plain_lines

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".txt": "lines",
    ".parquet": "Parquet",
}
PREFIX = "hf:"

_WRITTEN = f"Write {PREFIX}owner/name, then @revision, /subset, :split and :column as needed"
_FOLDER = tuple("./~")  # how the name of a folder begins
_COMMIT = re.compile(r"@([0-9a-f]{40})/")  # in the URLs of the Hub's files
_UNPACK = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Export the sheet as CSV. "),
    **dict.fromkeys((".zst", ".zip", ".bz2", ".xz"), "Unpack it first. "),
}


def kind_of(path: str | Path) -> str:
    """Return what kind of file the name promises, such as `"JSON Lines"`; a `ValueError` says what others to do."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if suffixes and suffixes[-1] in KINDS:
        return KINDS[suffixes[-1]]
    known = f"Rename it to one of {', '.join(KINDS)}, each also with .gz."
    if is_folder(path):
        raise ValueError(
            f"`{path}` is a folder. Give one of its files, or `{PREFIX}{path}` if it is laid out as a dataset. "
            f"Is it a file? {known}"
        )
    if re.fullmatch(r"[\w-]+(/[\w.-]+)?", str(path)) and not os.path.isfile(path):
        known += f" For a dataset on the Hub, write `{PREFIX}{path}`."
    raise ValueError(f"`{path}` is of no kind that can be read. {_UNPACK.get((suffixes or [''])[-1], '')}{known}")


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder of this name."""
    return os.path.isdir(os.path.expanduser(path))


def what_was_meant(path: str | Path) -> str:
    """Return what a file that is not there may have been, as a sentence, or an empty text."""
    path = Path(os.path.expanduser(path))
    if any(sign in path.name for sign in "*?["):
        return " Patterns are not expanded: name one file."
    there = {file.name.lower(): file.name for file in path.parent.iterdir()} if is_folder(path.parent) else {}
    near = difflib.get_close_matches(path.name.lower(), there, 1)
    return f" Did you mean `{there[near[0]]}`?" if near else ""


def read_records(
    path: str | Path, encoding: str | None = None, header: bool | None = None, notes: Notes | None = None
) -> Records:
    """Yield what a file holds, record by record, in bounded memory.

    Args:
        path (`str` or `Path`): The file; its name tells the kind (see [`KINDS`]). A `.json` file may hold an array,
            JSON Lines, or one object around either; a `.txt` file holds one prompt a line.
        encoding (`str`, *optional*): Such as `"latin-1"`. Left out, Unicode by the first bytes, or UTF-8. Bytes that
            do not fit come as lone surrogates, so that one of them does not end the reading.
        header (`bool`, *optional*): Whether a CSV or TSV file begins with names. Left out, told by its looks; without
            names the columns are called `"1"`, `"2"` and so on.
        notes (`list[str]`, *optional*): Takes what was guessed about the file.

    Yields:
        [`Record`] or [`RowError`]: In the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, of an unknown kind, or broken so that nothing after that can be read.
    """
    path = Path(path)
    kind = kind_of(path)
    readers: dict[str, Any] = {
        "JSON": read_json,
        "JSON Lines": partial(read_json, by_line=True),
        "CSV": partial(read_csv, header=header),
        "TSV": partial(read_csv, header=header, delimiter="\t"),
        "lines": read_plain_lines,
    }
    if not os.path.isfile(path):
        meant = what_was_meant(path)
        raise FileNotFoundError(f"There is no file `{path}`.{meant} Check the path; it is looked for in {Path.cwd()}.")
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if not start:
                raise ValueError(f"`{path}` is empty: it has no bytes. Was it written to the end?")
            if kind == "Parquet":
                yield from _read_parquet(stream)
                return
            newline = "" if kind in ("CSV", "TSV") else None
            text = io.TextIOWrapper(stream, encoding or encoding_of(start), "surrogateescape", newline=newline)
            yield from readers[kind](text, notes if notes is not None else [])
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{path}` is not a whole gzip file ({error}). Copy or download it again.") from error
    except BrokenFileError as error:
        raise ValueError(f"`{path}`, {error}") from error
    except LookupError as error:
        raise ValueError(f"`encoding` {encoding!r} is unknown to Python. Try utf-8, utf-16 or latin-1.") from error
    except UnicodeError as error:  # also where UTF-16 or UTF-32 must begin with a mark, and does not
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"`{path}` is not {encoding or 'Unicode'} text ({reason}). Name its `encoding`, or leave it out for UTF-8."
        ) from error


def encoding_of(start: bytes) -> str:
    """Tell Unicode encodings apart by a byte order mark, or by the zero byte next to a first ASCII character."""
    marks = {b"\xff\xfe\0\0": "utf-32", b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for mark, encoding in marks.items():
        if start.startswith(mark):
            return encoding
    if 0 in start[:2]:
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-8"


def _read_parquet(stream: Any) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:  # from its end, to which a gzip stream cannot go
        file = parquet.ParquetFile(io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream)
    except pyarrow.ArrowInvalid as error:
        raise BrokenFileError("from the start", f"no Parquet ({error})", "a whole Parquet file") from error
    values = (value for batch in file.iter_batches(batch_size=1024) for value in batch.to_pylist())
    rows = named_classes(values, _classes_in(file.schema_arrow.metadata or {}))
    return (Record(number, row, "row") for number, row in enumerate(rows, 1))


def _classes_in(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return by column the names of the classes that `datasets` keeps next to the rows of a Parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"].items()
    except (AttributeError, KeyError, TypeError, ValueError):  # written by something else
        return {}
    described = {name: found for name, found in features if isinstance(found, dict)}  # a list, where rows hold lists
    return {name: found["names"] for name, found in described.items() if found.get("_type") == "ClassLabel"}


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    Args:
        name (`str`): Its id on the Hub, such as `"tatsu-lab/alpaca"`, or a folder with files of data.
        subset (`str`, *optional*): Its configuration, where it has several.
        split (`str`, *optional*): Its split, where it has several.
        column (`str`, *optional*): The column that holds the prompts.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; left out, its newest.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        name = f"{self.name}@{self.revision}" if self.revision else self.name
        parts = [f"{name}/{self.subset}" if self.subset else name, self.split or "", self.column or ""]
        return PREFIX + ":".join(parts).rstrip(":")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.name[:1] in _FOLDER

    def load(self) -> tuple[Iterator[Record], HubDataset]:
        """Return its rows, from the files that `datasets` keeps for it, and itself with the commit that was read."""
        from datasets import Dataset, load_dataset

        name = os.path.expanduser(self.name) if self.is_folder else self.name
        if self.is_folder and not is_folder(name):
            raise ValueError(f"There is no folder `{name}`. Check the path; it is looked for in {Path.cwd()}.")
        try:
            rows = load_dataset(name, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # `datasets` raises what the network, the Hub and each reader of files raise
            raise ValueError(
                f"`{self}` could not be loaded: {str(error).rstrip('.')}. {_WRITTEN}; for a private or gated dataset, "
                "log in with `hf auth login`."
            ) from error
        if not isinstance(rows, Dataset):
            if len(rows) > 1:
                splits = ", ".join(f"{PREFIX}{self.name}:{split}" for split in rows)
                raise ValueError(f"`{self}` has several splits. Name one of them, as in {splits}.")
            rows = next(iter(rows.values()))
        if self.column is not None and self.column not in rows.column_names:
            columns = ", ".join(f"`{name}`" for name in rows.column_names)
            raise ValueError(f"`{self}` has no column `{self.column}`. It has {columns}.")
        commit = next(filter(None, map(_COMMIT.search, rows.info.download_checksums or ())), None)
        read = replace(self, revision=commit[1] if commit else self.revision)
        return (Record(number, row, "row") for number, row in enumerate(with_class_names(rows), 1)), read


def hub_dataset(source: str | Path) -> HubDataset | None:
    """Return the dataset that a source such as `hf:owner/name@revision/subset:split:column` names; `None` for a file.

    All but the name may be left out; one that begins with `.`, `/` or `~` is a folder, without subset and revision.

    Example:

    ```python
    >>> str(hub_dataset("hf:walledai/XSTest:test")), hub_dataset("rows.csv")
    ('hf:walledai/XSTest:test', None)

    ```
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return None
    name, *rest = text.removeprefix(PREFIX).split(":")
    subset, revision = "", ""
    if name[:1] not in _FOLDER:
        parts = name.split("/", 2)
        name, subset = "/".join(parts[:2]).rstrip("/"), "".join(parts[2:])
        name, _, revision = name.partition("@")
    if not name or len(rest) > 2 or "/" in subset:
        raise ValueError(f"`{text}` is no dataset. {_WRITTEN}.")
    split, column = [*rest, "", ""][:2]
    return HubDataset(name, subset or None, split or None, column or None, revision or None)
