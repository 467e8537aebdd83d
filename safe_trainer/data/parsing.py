"""Text to records, streamed: JSON, JSON Lines, tables and plain lines.

What cannot be read is yielded as [`RowError`] in its place, and reading goes on after it wherever that is possible.
Rows are named as people find them: by line in JSON Lines, CSV and text; by index in a JSON array, Parquet, a dataset
or a list.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

LONGEST = 16 * 2**20  # characters of a line or row; more is a missing quote or line break rather than a row
_CHUNK = 2**16
_SHOWN = 60  # characters of a value that a message shows
_WHOLE = 4 * 2**20  # characters up to which a JSON document is read at once, so that odd shapes of it can be seen
_NO_SPACE = re.compile(r"\S")
_NUMBER_GOES_ON = re.compile(r"[-+.eE\d]*")  # what may be the rest of a number, if the text ends there

Notes = list[str]


@dataclass(frozen=True)
class Record:
    """One record as it is in a file: a `dict`, a `list` for a bare list of turns, a `str` for a bare prompt."""

    line: int  # where it begins, or the row's number, counted from 1
    value: Any
    unit: str = "line"  # "line" or "row": what `line` counts


@dataclass(frozen=True)
class RowError:
    """A row that could not be used: where it is (as for [`Record`]), what is wrong, what was found and expected.

    `kind` says in a few words what is wrong, the same for all rows with this error.
    """

    line: int
    kind: str
    found: str
    expected: str
    unit: str = "line"

    def __str__(self) -> str:
        place = f"line {self.line}" if self.unit == "line" else f"row {self.line} (index {self.line - 1})"
        return f"{place}: {self.kind}: found {self.found}, expected {self.expected}"


Records = Iterator[Record | RowError]


class BadRowError(ValueError):
    """A record cannot be used: what is wrong with it, what was found, what was expected."""

    def __init__(self, kind: str, found: str, expected: str) -> None:
        super().__init__(f"{kind}: found {found}, expected {expected}")
        self.kind, self.found, self.expected = kind, found, expected

    def of(self, record: Record) -> RowError:
        """Return the error with the place of its record."""
        return RowError(record.line, self.kind, self.found, self.expected, record.unit)


class BrokenFileError(ValueError):
    """Nothing after this point of a file can be read."""

    def __init__(self, place: str, found: str, expected: str) -> None:
        super().__init__(f"{place}: found {found}, expected {expected}.")


def shortened(value: Any) -> str:
    """Return how a message shows what was found: on one line, and not the whole of a long text."""
    try:
        text = repr(value.strip()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = "values nested too deeply to be read"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ---- JSON


def read_json(text: TextIO, notes: Notes, by_line: bool = False) -> Records:
    """Yield the rows of a JSON file: an array, JSON Lines, or one object around either.

    With `by_line` it should be JSON Lines, and is read as a document only if all of it is one.
    """
    start = text.read(_WHOLE + 1)
    text.seek(0)
    opening = start.lstrip()[:1]
    if opening == "[" and not by_line:
        yield from _values(text)
        return
    first, _, others = start.strip().partition("\n")
    is_by_line = _is_json(first) and (others or by_line) or by_line and opening not in ("[", "{")
    if len(start) <= _WHOLE and not is_by_line:
        guessed = ["read as one JSON document, not as JSON Lines"] if by_line else []
        try:
            found = _document(start, guessed)
        except BrokenFileError:
            if not by_line and not any(line.startswith("{") and _is_json(line) for line in others.splitlines()):
                raise
            found = []
        if found and not (by_line and any(isinstance(record, RowError) for record in found)):
            notes += guessed[-1:]
            yield from found
            return
    decoder = _Decoder()
    for line in _lines(text):
        yield from [line] if isinstance(line, RowError) else _values_of_line(line, decoder)


def _values_of_line(line: Record, decoder: _Decoder) -> Records:
    content = line.value.strip().rstrip(",")
    try:
        value = decoder.decode(content)
    except json.JSONDecodeError as error:
        found = f"{shortened(line.value)} ({error.msg} at character {error.pos + 1})"
        quotes = " in double quotes, as `json.dumps` writes it" if content[:2] in ("{'", "['") else ""
        yield RowError(line.line, "not JSON", found, f"one whole JSON value a line{quotes}")
        return
    if decoder.fault:
        yield decoder.fault.of(line)
    else:
        yield from (Record(line.line, row) for row in (value if _is_table(value) else [value]))


def _document(text: str, notes: Notes) -> list[Record | RowError]:
    """Return the rows of one JSON text: an array, objects one after another, or one object in a shape of its own."""
    found = list(_values(io.StringIO(text)))
    value = getattr(found[0], "value", None) if len(found) == 1 and text.lstrip()[:1] != "[" else None
    if not isinstance(value, dict):
        return found
    return [Record(number, row, "row") for number, row in enumerate(_unwrapped(value, notes), 1)]


def _values(text: TextIO) -> Records:
    """Yield the values of an array, or those that follow each other."""
    window, number = _Window(text), 0
    is_array = window.next() == "["
    window.at += is_array
    while (sign := window.next()) and not (is_array and sign == "]"):
        number += 1
        yield window.value(number)
        sign = window.next()
        if is_array and sign not in (",", "]"):
            raise window.broken(number, window.around(), "`,` or `]` after a row")
        window.at += sign == ","
    if is_array and not sign:
        raise window.broken(number + 1, window.around(), "a row, or `]` after the last")
    window.at += is_array
    if window.next():
        raise window.broken(number, f"{window.around()} after the array", "the end, or a name in .jsonl")


class _Window:
    """A JSON text of any length, of which only the part that is being decoded is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.decoder = file, _Decoder()
        self.text, self.at, self.line = "", 0, 1

    def _more(self) -> bool:
        """Read on, as much as there is from here or more; return whether there was anything."""
        rest = self.text[self.at :]
        more = self.file.read(max(_CHUNK, len(rest)))
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = rest + more, 0
        return bool(more)

    def next(self) -> str:
        """Go to the next character that is no space, and return it; at the end, nothing."""
        while not (found := _NO_SPACE.search(self.text, self.at)):
            self.at = len(self.text)
            if not self._more():
                return ""
        self.at = found.start()
        return found.group()

    def value(self, number: int) -> Record | RowError:
        """Return the value that begins here, and move past it."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                offset = error.pos - self.at
                if len(self.text) - self.at > LONGEST or not self._more():
                    self.at += offset
                    raise self.broken(number, f"{self.around()} ({error.msg})", "a whole JSON value") from error
                continue
            length = end - self.at
            if not _NUMBER_GOES_ON.fullmatch(self.text, end) or not self._more():
                break
        self.at += length
        record = Record(number, value, "row")
        return self.decoder.fault.of(record) if self.decoder.fault else record

    def around(self) -> str:
        """Return what a message shows of the text from here on."""
        rest = self.text[self.at :]
        return shortened(rest[:60]) if rest.strip() else "the end of the file"

    def broken(self, number: int, found: str, expected: str) -> BrokenFileError:
        """Return the error for what was found here."""
        line = self.line + self.text.count("\n", 0, self.at)
        return BrokenFileError(f"row {number} (index {number - 1}), line {line}", found, expected)


class _Decoder(json.JSONDecoder):
    """Decodes JSON; `fault` is what makes the last value unusable, though it is JSON."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=self._integer)
        self.fault: BadRowError | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return a value, and where it ends."""
        self.fault = None
        try:
            return super().raw_decode(s, idx)
        except RecursionError as error:
            raise json.JSONDecodeError("values nested too deeply to be read", s, idx) from error

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # `json` would take the last without a word
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.fault = BadRowError("a key twice", f"`{twice}` twice", "each key once")
        return found

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            found = "a whole number with more digits than can be read"
            self.fault = BadRowError("not JSON", found, "a shorter one, or text in quotes")
            return 0


def _is_json(line: str) -> bool:
    try:
        _Decoder().decode(line.strip().rstrip(","))
    except json.JSONDecodeError:
        return False
    return True


def _unwrapped(value: dict[str, Any], notes: Notes) -> list[Any]:
    """Return the rows of one object: it may be a row, hold a list of them, or be a table by columns or by ids."""
    inner = list(value.values())
    tables = [name for name, content in value.items() if _is_table(content)]
    lists = [content for content in inner if isinstance(content, list)]
    is_by_column = len(lists) == len(inner) and len({len(content) for content in lists}) == 1
    if len(tables) == 1 and not (is_by_column and len(inner) > 2):  # one column of a table may hold objects
        notes.append(f"the rows are taken from `{tables[0]}`")
        return list(value[tables[0]])
    if len(tables) > 1:
        raise BrokenFileError("one object", f"several lists of rows: {', '.join(tables)}", "one list, in a file")
    if inner and all(isinstance(content, dict) and content for content in inner):
        if all(key.isdecimal() for content in inner for key in content):  # as pandas writes a table, by columns
            notes.append("one object of columns, as pandas writes it, is read as rows")
            keys = dict.fromkeys(key for content in inner for key in content)  # the first column may have gaps
            return [{name: value[name].get(key) for name in value} for key in keys]
        notes.append("one object of rows by id is read as rows")
        return inner
    if inner and all(isinstance(content, list) and content for content in inner) and not _has_turns(inner):
        if len({len(content) for content in inner}) > 1:
            raise BrokenFileError("one object", "columns of different lengths", "as many values in each of them")
        notes.append("one object of columns is read as rows")
        return [dict(zip(value, cells, strict=True)) for cells in zip(*inner, strict=True)]
    notes.append("the file is one object, which is read as one row; more rows need an array `[…]` or JSON Lines")
    return [value]


def _has_turns(lists: list[list[Any]]) -> bool:
    return any(isinstance(content[0], dict) and {"role", "from"} & set(content[0]) for content in lists)


def _is_table(value: Any) -> bool:
    """Return whether a value is a list of rows, which turns of a conversation are not."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not _has_turns([value])


# ---- lines and tables


def read_plain_lines(text: TextIO, notes: Notes) -> Records:
    """Yield each line that is not blank as a bare prompt."""
    for line in _lines(text):
        yield line if isinstance(line, RowError) else Record(line.line, line.value.strip())


def _pieces(text: TextIO) -> Iterator[str]:
    return iter(lambda: text.readline(LONGEST + 1), "")


def _lines(text: TextIO) -> Records:
    """Yield the lines that are not blank, never holding more than [`LONGEST`] characters."""
    for number, line in enumerate(_pieces(text), 1):
        if len(line) > LONGEST and not line.endswith("\n"):
            while (rest := text.readline(LONGEST)) and not rest.endswith("\n"):
                pass
            yield RowError(number, "too long", f"more than {LONGEST:,} characters", "line breaks between rows")
        elif line.strip():
            yield Record(number, line)


def read_csv(text: TextIO, notes: Notes, *, header: bool | None = None, delimiter: str | None = None) -> Records:
    """Yield one dictionary a row, with the names of the header or, without one, `"1"`, `"2"` and so on."""
    # A limit of the whole process, 128 KiB unless raised, which a long answer may exceed; it is never lowered here.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = _csv_lines(text)
    first, skipped = next(lines, ""), 0
    if setting := re.fullmatch(r'"?sep=(.)"?\s*', first):  # which Excel writes, and reads
        delimiter, first, skipped = setting[1], next(lines, ""), 1
    reader = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    names: list[str] = []
    start = 1 + skipped
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = f"quotes that do not match up to line {reader.line_num + skipped} ({error})"
            yield RowError(start, "not CSV", found, 'text with quotes "…" around the whole cell and "" within')
            cells = []
        if cells and not names:
            names, cells = _header(cells, header, start, notes)
        if start > 1 + skipped and [cell.strip(" \ufeff") for cell in cells] == names:
            yield RowError(start, "the header again", shortened(", ".join(cells)), "rows; were two files joined?")
        elif cells and len(cells) == len(names):
            yield Record(start, dict(zip(names, cells, strict=True)))
        elif cells:
            expected = f"{len(names)}, as in the first line"
            yield RowError(start, "wrong number of cells", f"{len(cells)}", expected)
        start = reader.line_num + skipped + 1


def _header(cells: list[str], header: bool | None, line: int, notes: Notes) -> tuple[list[str], list[str]]:
    """Return the names of the columns, and the cells of the first row if it is none of names."""
    if header is None:
        header = looks_like_header(cells)
        if header is None:
            found = f"{', '.join(map(repr, cells))}, which may be names of columns or a row"
            expected = "to be told which, by `header=True` or `header=False`, or by `columns`, such as {'prompt': "
            raise BrokenFileError(f"line {line}", found, f"{expected}{cells[0]!r}}}, or {{'prompt': '1'}} for a row")
        if not header and len(cells) > 1:
            notes.append(f"without a header: its first row is {shortened(', '.join(cells))}")
    names = [name.strip() for name in cells] if header else [str(n + 1) for n in range(len(cells))]
    if len(set(names)) < len(names):
        raise BrokenFileError(f"line {line}", f"the header {', '.join(names)}", "a different name for each column")
    return names, [] if header else cells


def _csv_lines(text: TextIO) -> Iterator[str]:
    for number, line in enumerate(_pieces(text), 1):
        if len(line) > LONGEST:
            found = f"more than {LONGEST:,} characters in one line"
            raise BrokenFileError(f"line {number}", found, "line breaks between rows")
        yield line


# A header's words, by which it is told from a row.
_NAMES = frozenset(
    "answer assistant behavior behaviour category chat chosen completion content context conversation conversations "
    "goal id index input instruction label language messages output passage prompt question query reference reply "
    "request response role source split system target text title topic turn type user".split()
)


def looks_like_header(cells: list[str]) -> bool | None:
    """Tell names of columns from a row: yes, no, or `None` if it may be either."""
    cores = [re.sub(r"[(\[{<].*|[\s:?*#]+$", "", cell.strip()).strip().lower() for cell in cells]
    plain = r"\s*[^\W\d][\w./-]*" + (r"\s*" if len(cells) == 1 else r"( [\w./-]+){0,2}\s*")
    if any(core in _NAMES or core.removesuffix("s") in _NAMES for core in cores):
        return True
    if all(len(cell) <= 40 and re.fullmatch(plain, cell) for cell in cells):
        return True
    if len(cells) == 1:
        few_words = r"[\w'’/-]+( [\w'’/-]+){1,2}\s*([(\[{<].*|[:*#])?"
        return None if re.fullmatch(few_words, cells[0].strip()) else False
    text = r".{61,}|.*[.!…\"']\s*|[\W\d]*"  # long, or with an end as a sentence has, or without a letter
    return False if any(re.fullmatch(text, cell, re.DOTALL) for cell in cells) else None


def _delimiter(line: str) -> str:
    """Return the separator that makes the first line a header; a comma where none does."""
    for delimiter in ",;\t|":
        cells = [cell.strip().strip('"') for cell in line.strip().split(delimiter)]
        if len(cells) > 1 and looks_like_header(cells):
            return delimiter
    return ","
