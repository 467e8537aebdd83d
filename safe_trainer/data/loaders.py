"""Where records come from: files of every common kind, also gzipped, and datasets on the Hub or in a folder."""

from __future__ import annotations

import difflib
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

_FOLDER = tuple("./~")  # how the name of a folder begins
_UNPACK = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Export the sheet as CSV. "),
    **dict.fromkeys((".zst", ".zip", ".bz2", ".xz"), "Unpack it first. "),
}


def kind_of(path: str | Path) -> str:
    """Return what kind of file the name promises, such as `"JSON Lines"`.

    Raises:
        ValueError: If it is none that can be read.
    """
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
    if re.fullmatch(r"[\w-]+(/[\w.-]+)?", str(path)) and not is_file(path):
        known += f" For a dataset on the Hub, write `{PREFIX}{path}`."
    raise ValueError(f"`{path}` is of no kind that can be read. {_UNPACK.get((suffixes or [''])[-1], '')}{known}")


def is_file(path: str | Path) -> bool:
    """Return whether there is a file of this name; of one that no file can have, there is none."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder of this name."""
    return os.path.isdir(os.path.expanduser(path))


def missing_file(path: str | Path) -> FileNotFoundError:
    """Return the error for a file that is not there, with what it may have been."""
    path = Path(path).expanduser()
    there = {file.name.lower(): file.name for file in path.parent.iterdir()} if is_folder(path.parent) else {}
    near = difflib.get_close_matches(path.name.lower(), there, 1)
    hint = f" Did you mean `{there[near[0]]}`?" if near else ""
    if any(sign in path.name for sign in "*?["):
        hint = " Patterns are not expanded: name one file."
    return FileNotFoundError(f"There is no file `{path}`.{hint} Check the path; it is looked for in {Path.cwd()}.")


def read_records(
    path: str | Path, encoding: str | None = None, header: bool | None = None, notes: Notes | None = None
) -> Records:
    """Yield what a file holds, record by record, in bounded memory.

    Args:
        path (`str` or `Path`): The file; its name tells the kind (see [`KINDS`]). A `.json` file may hold an array,
            JSON Lines, or one object around either; a `.txt` file holds one prompt a line.
        encoding (`str`, *optional*): Such as `"latin-1"`. Left out, UTF-8, or UTF-16 and UTF-32 where the first bytes
            say so. Bytes that do not fit come as lone surrogates, so that one of them does not end the reading.
        header (`bool`, *optional*): Whether a CSV or TSV file begins with names. Left out, told by its looks; without
            names the columns are called `"1"`, `"2"` and so on.
        notes (`list[str]`, *optional*): Takes what was guessed about the file.

    Yields:
        [`Record`] or [`RowError`]: In the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, of an unknown kind, or broken so that nothing after that can be read.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = path.write_text('{"text": "one"}' + chr(10) + '{"text": ')
    >>> [type(item).__name__ for item in read_records(path)]
    ['Record', 'RowError']

    ```
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
    if not is_file(path):
        raise missing_file(path)
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
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not {error.encoding} text ({error.reason}). Name its `encoding`.") from error


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
    return (Record(number, value, "row") for number, value in enumerate(values, 1))


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    Args:
        name (`str`): Its id on the Hub, such as `"tatsu-lab/alpaca"`, or a folder with files of data.
        subset (`str`, *optional*): Its configuration, where it has several.
        split (`str`, *optional*): Its split; may be left out where there is only one.
        column (`str`, *optional*): The column that holds the prompts; left out, told by the names of the columns.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.name}/{self.subset}" if self.subset else self.name, self.split or "", self.column or ""]
        return PREFIX + ":".join(parts).rstrip(":")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.name[:1] in _FOLDER

    def records(self) -> Iterator[Record]:
        """Yield its rows, from the files that `datasets` keeps for it, in bounded memory.

        Raises:
            ValueError: If it could not be loaded, or has several splits of which none is named.
        """
        rows = self._rows()
        if self.column is not None and self.column not in rows.column_names:
            columns = ", ".join(f"`{name}`" for name in rows.column_names)
            raise ValueError(f"`{self}` has no column `{self.column}`. It has {columns}.")
        return (Record(number, row, "row") for number, row in enumerate(rows, 1))

    def _rows(self) -> Any:
        from datasets import Dataset, load_dataset

        name = self.name
        if self.is_folder:
            name = str(Path(name).expanduser())
            if not Path(name).is_dir():
                raise ValueError(f"There is no folder `{name}`. Check the path; it is looked for in {Path.cwd()}.")
        try:
            found = load_dataset(name, self.subset, split=self.split)
        except Exception as error:  # `datasets` raises what the network, the Hub and each reader of files raise
            raise ValueError(
                f"`{self}` could not be loaded: {str(error).rstrip('.')}. Write {PREFIX}owner/name, then /subset, "
                ":split and :column as needed; for a private or gated dataset, log in with `hf auth login`."
            ) from error
        if isinstance(found, Dataset):
            return found
        if len(found) > 1:
            splits = ", ".join(f"{PREFIX}{self.name}:{split}" for split in found)
            raise ValueError(f"`{self}` has several splits. Name one of them, as in {splits}.")
        return next(iter(found.values()))


def hub_dataset(source: str | Path) -> HubDataset | None:
    """Read a source such as `hf:owner/name/subset:split:column`, all but the name optional; `None` for a file.

    A name that begins with `.`, `/` or `~` is a folder, and has no subset.

    Raises:
        ValueError: If it begins like one and is none.

    Example:

    ```python
    >>> hub_dataset("hf:walledai/XSTest:test"), hub_dataset("rows.csv")
    (HubDataset(name='walledai/XSTest', subset=None, split='test', column=None), None)

    ```
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return None
    name, *rest = text.removeprefix(PREFIX).split(":")
    subset = None
    if name[:1] not in _FOLDER:
        owner, _, inner = name.partition("/")
        inner, _, subset = inner.partition("/")
        name = f"{owner}/{inner}" if inner else owner
    if not name or len(rest) > 2 or (subset and "/" in subset):
        raise ValueError(
            f"`{text}` is no dataset. Write {PREFIX}owner/name, then /subset, :split and :column as needed."
        )
    split, column = [*(part or None for part in rest), None, None][:2]
    return HubDataset(name, subset or None, split, column)
