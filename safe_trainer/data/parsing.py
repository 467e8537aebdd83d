"""Text to records: JSON, JSON Lines, CSV and plain lines, streamed.

What cannot be read is yielded as [`RowError`] in its place, and reading goes on behind it wherever that is possible.
Python's own `json` and `csv` do the parsing: columnar readers are faster, but give up a whole file for one bad row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

LONGEST = 16 * 2**20
"""The longest record that is read, in characters. More is a missing quote or line break rather than a row."""

_CHUNK = 2**18
_DEEP = "values nested too deeply to be read"
_LONG = ("not JSON", "a whole number with more digits than can be read", "a shorter one, or text in quotes")


@dataclass(frozen=True)
class Record:
    """One record as it stands in a file.

    Args:
        line (`int`): Where it begins, counted from 1; in Parquet the number of the row.
        value (`Any`): A `dict` for most files, a `list` for a bare list of turns, a `str` for a bare prompt.
    """

    line: int
    value: Any
    unit: str = "line"


@dataclass(frozen=True)
class RowError:
    """A row that could not be used, and why.

    Args:
        line (`int`): Where it begins, counted from 1; in Parquet the number of the row.
        kind (`str`): What is wrong in a few words, the same for all rows with this trouble.
        found (`str`): What stands there.
        expected (`str`): What should stand there.
    """

    line: int
    kind: str
    found: str
    expected: str
    unit: str = "line"

    def __str__(self) -> str:
        place = f"line {self.line}" if self.unit == "line" else f"row {self.line} (index {self.line - 1})"
        return f"{place}: {self.kind}: found {self.found}, expected {self.expected}"


class BrokenFileError(ValueError):
    """Nothing behind this point of a file can be read."""

    def __init__(self, line: int, found: str, expected: str) -> None:
        super().__init__(f"line {line}: found {found}, expected {expected}.")


def read_json(text: TextIO) -> Iterator[Record | RowError]:
    """Yield the elements of one array, or of JSON Lines if the text does not begin with `[`."""
    scanner = _Scanner(text)
    if scanner.peek() == "[":
        yield from _array(scanner)
        return
    text.seek(0)
    if text.readline(LONGEST).strip() == "{":
        raise BrokenFileError(1, "one object over several lines", "an array of rows `[…]` or one object a line")
    text.seek(0)
    yield from read_json_lines(text)


def read_json_lines(text: TextIO) -> Iterator[Record | RowError]:
    """Yield one record for each line that is not blank."""
    for line in _lines(text):
        if isinstance(line, RowError):
            yield line
            continue
        try:
            yield Record(line.line, json.loads(line.value))
        except json.JSONDecodeError as error:
            found = f"{shortened(line.value)} ({error.msg} at character {error.pos + 1})"
            yield RowError(line.line, "not JSON", found, "one whole JSON value a line")
        except RecursionError:
            yield RowError(line.line, "not JSON", _DEEP, "a row")
        except ValueError:  # which Python says of long numbers only
            yield RowError(line.line, *_LONG)


def read_plain_lines(text: TextIO) -> Iterator[Record | RowError]:
    """Yield each line that is not blank as a bare prompt."""
    for line in _lines(text):
        yield line if isinstance(line, RowError) else Record(line.line, line.value.strip())


def read_csv(text: TextIO, delimiter: str | None = None, header: bool | None = None) -> Iterator[Record | RowError]:
    """Yield one dictionary a row, with the names of the header or, without one, `"1"`, `"2"` and so on.

    Args:
        text (`TextIO`): Opened with `newline=""`.
        delimiter (`str`, *optional*): Left out, the one of comma, semicolon and tab that makes the first line a
            header.
        header (`bool`, *optional*): Left out, told by whether the first line looks like names.
    """
    # A limit of the whole process, 128 KiB unless raised, which a long answer may exceed; it is never lowered here.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = _csv_lines(text)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    names: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = f"quotes that do not match up to line {reader.line_num} ({error})"
            yield RowError(start, "not CSV", found, 'text with quotes "…" around the whole cell and "" within')
            cells = []
        if cells and names is None:
            has_header = _looks_like_header(cells) if header is None else header
            names = [name.strip() for name in cells] if has_header else [str(n + 1) for n in range(len(cells))]
            if len(set(names)) < len(names):
                raise BrokenFileError(start, f"the header {', '.join(names)}", "a different name for each column")
            cells = [] if has_header else cells
        if cells and len(cells) == len(names or ()):
            yield Record(start, dict(zip(names or (), cells, strict=True)))
        elif cells:
            yield RowError(
                start, "wrong number of cells", f"{len(cells)}", f"{len(names or ())}, as in the first line"
            )
        start = reader.line_num + 1


def shortened(value: Any, length: int = 60) -> str:
    """Return how a message shows what was found: on one line, and not the whole of a long text."""
    try:
        text = repr(value.strip()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = _DEEP
    return text if len(text) <= length else f"{text[:length]}…"


def _lines(text: TextIO) -> Iterator[Record | RowError]:
    """Yield the lines that are not blank, never holding more than [`LONGEST`] characters."""
    number = 0
    while line := text.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST and not line.endswith("\n"):
            while (rest := text.readline(LONGEST)) and not rest.endswith("\n"):
                pass
            yield RowError(number, "too long", f"more than {LONGEST:,} characters", "line breaks between rows")
        elif line.strip():
            yield Record(number, line)


def _csv_lines(text: TextIO) -> Iterator[str]:
    number = 0
    while line := text.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise BrokenFileError(number, f"more than {LONGEST:,} characters in one line", "line breaks between rows")
        yield line


def _looks_like_header(cells: list[str]) -> bool:
    """Tell names from data: short, and without spaces if there is only one column, which may hold prompts."""
    pattern = r"\s*[^\W\d][\w./-]*\s*" if len(cells) == 1 else r"\s*[^\W\d][\w./-]*( [\w./-]+){0,2}\s*"
    return all(len(cell) <= 40 and re.fullmatch(pattern, cell) for cell in cells)


def _delimiter(line: str) -> str:
    for delimiter in ",;\t":
        cells = line.strip().split(delimiter)
        if len(cells) > 1 and _looks_like_header([cell.strip('"') for cell in cells]):
            return delimiter
    return ","


def _array(scanner: _Scanner) -> Iterator[Record | RowError]:
    scanner.skip(1)
    while scanner.peek() != "]":
        yield scanner.record()
        if scanner.peek() == ",":
            scanner.skip(1)
        elif scanner.peek() != "]":
            raise BrokenFileError(scanner.line, scanner.around(), "`,` or `]` after an element of the array")
    scanner.skip(1)
    if scanner.peek():
        raise BrokenFileError(scanner.line, f"{scanner.around()} after the array", "the end, or a name in .jsonl")


class _Scanner:
    """A window on a long JSON text: it grows until a value is whole and then moves on, counting lines."""

    def __init__(self, text: TextIO) -> None:
        self.text, self.window, self.position, self.line = text, "", 0, 1

    def skip(self, count: int) -> None:
        end = self.position + count
        self.line += self.window.count("\n", self.position, end)
        self.position = end

    def grow(self) -> bool:
        """Read on, at least doubling the window, so that a long value is not parsed again too often."""
        self.window, self.position = self.window[self.position :], 0
        more = self.text.read(max(_CHUNK, len(self.window)))
        self.window += more
        return bool(more)

    def peek(self) -> str:
        """Return the next character that is no space, or nothing at the end."""
        while True:
            space = re.compile(r"\s*").match(self.window, self.position)
            self.skip(space.end() - self.position if space else 0)
            if self.position < len(self.window) or not self.grow():
                return self.window[self.position : self.position + 1]

    def record(self) -> Record | RowError:
        """Read one value."""
        decoder, is_long = json.JSONDecoder(), False
        while True:
            try:
                value, end = decoder.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # An error at the end of the window may be a value that goes on behind it.
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.window) - 16
                good = error.pos - self.position
                if len(self.window) - self.position > LONGEST or not cut_off or not self.grow():
                    self.skip(good)
                    raise BrokenFileError(self.line, f"{self.around()} ({error.msg})", "a whole JSON value") from error
                continue
            except RecursionError as error:
                raise BrokenFileError(self.line, _DEEP, "a row") from error
            except ValueError:  # which Python says of long numbers only; read as text, they show where the value ends
                decoder, is_long = json.JSONDecoder(parse_int=str), True
                continue
            if end < len(self.window) or not self.grow():  # a number might go on
                break
        found = RowError(self.line, *_LONG) if is_long else Record(self.line, value)
        self.skip(end - self.position)
        return found

    def around(self) -> str:
        """Return what stands at the position, for a message."""
        return shortened(self.window[self.position : self.position + 60]) if self.peek() else "the end of the file"
