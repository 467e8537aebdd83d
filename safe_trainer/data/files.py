"""Files to records: JSON, JSON Lines, CSV, TSV, plain lines and Parquet, also gzipped, in the encodings that occur.

Everything is streamed, so a file may be larger than memory.
"""

from __future__ import annotations

import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfileobj

from .parsing import BrokenFileError, Record, RowError, read_csv, read_json, read_json_lines, read_plain_lines

Stream = gzip.GzipFile | io.BufferedReader

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".txt": "lines",
    ".parquet": "Parquet",
}


def kind_of(path: str | Path) -> str:
    """Return what kind of file the name promises, such as `"JSON Lines"`.

    Raises:
        ValueError: If it is none that can be read.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise ValueError(
            f"`{path}` is of no kind that can be read. Rename it to one of {', '.join(KINDS)}, each also with .gz."
        )
    return KINDS[suffixes[-1]]


def is_file(path: str | Path) -> bool:
    """Return whether there is a file of this name; of one that no file can have, there is none."""
    try:
        return Path(path).is_file()
    except OSError:  # such as a name that is too long
        return False


def read_records(
    path: str | Path, encoding: str | None = None, header: bool | None = None
) -> Iterator[Record | RowError]:
    """Yield what a file holds, record by record, in bounded memory.

    Args:
        path (`str` or `Path`): The file; its name tells the kind (see [`KINDS`]). A `.json` file may hold an array or
            JSON Lines, a `.txt` file one prompt a line.
        encoding (`str`, *optional*): Such as `"latin-1"`. Left out, UTF-8, or UTF-16 and UTF-32 where the first bytes
            say so. Bytes that do not fit come as lone surrogates, so that one of them does not end the reading.
        header (`bool`, *optional*): Whether a CSV or TSV file begins with names. Left out, told by its looks; without
            names the columns are called `"1"`, `"2"` and so on.

    Yields:
        [`Record`] or [`RowError`]: In the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, of an unknown kind, or broken so that nothing behind can be read.

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
    if not is_file(path):
        raise FileNotFoundError(f"There is no file `{path}`. Check the path; it is looked for in {Path.cwd()}.")
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if not start:
                raise ValueError(f"`{path}` is empty: it has no bytes. Was it written to the end?")
            if kind == "Parquet":
                yield from _read_parquet(stream)
            else:
                yield from _read_text(stream, kind, encoding or encoding_of(start), header)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{path}` is not a whole gzip file ({error}). Copy or download it again.") from error
    except BrokenFileError as error:
        raise ValueError(f"`{path}`, {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not {error.encoding} text ({error.reason}). Name its `encoding`.") from error


def _read_text(stream: Stream, kind: str, encoding: str, header: bool | None) -> Iterator[Record | RowError]:
    try:
        text = io.TextIOWrapper(stream, encoding, "surrogateescape", newline="" if kind in ("CSV", "TSV") else None)
    except LookupError as error:
        raise ValueError(f"`encoding` {encoding!r} is unknown to Python. Try utf-8, utf-16 or latin-1.") from error
    if kind in ("CSV", "TSV"):
        return read_csv(text, "\t" if kind == "TSV" else None, header)
    return {"JSON": read_json, "JSON Lines": read_json_lines, "lines": read_plain_lines}[kind](text)


def _read_parquet(stream: Stream) -> Iterator[Record | RowError]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as whole:
        if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end, which a gzip stream cannot do in steps
            copyfileobj(stream, whole)
        try:
            file = parquet.ParquetFile(whole if isinstance(stream, gzip.GzipFile) else stream)
        except pyarrow.ArrowInvalid as error:
            raise BrokenFileError(1, f"no Parquet ({error})", "a whole Parquet file") from error
        row = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                row += 1
                yield Record(row, value)


def encoding_of(start: bytes) -> str:
    """Tell Unicode encodings apart by a byte order mark, or by the zero beside a first ASCII character."""
    marks = {b"\xff\xfe\0\0": "utf-32", b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for mark, encoding in marks.items():
        if start.startswith(mark):
            return encoding
    if 0 in start[:2]:
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-8"
