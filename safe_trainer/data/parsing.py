"""Text to records: JSON, JSON Lines, tables and plain lines.

Whatever may be large is streamed: lines, tables, and arrays of JSON through `ijson`. What cannot be read is yielded as
[`RowError`] in its place, and reading goes on after it wherever that is possible. Rows are named as people find them:
by line in JSON Lines, CSV and text; by index in a JSON array, Parquet, a dataset or a list.
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
"""The longest line that is read, in characters. More is a missing quote or line break rather than a row."""

_WHOLE = 4 * 2**20  # characters up to which a JSON document is read at once, so that odd shapes of it can be seen
_DEEP = "values nested too deeply to be read"
_LONG = ("not JSON", "a whole number with more digits than can be read", "a shorter one, or text in quotes")
_SPACE = re.compile(r"\s*")

Notes = list[str]


@dataclass(frozen=True)
class Record:
    """One record as it is in a file.

    Args:
        line (`int`): The line where it begins, or the row's number, counted from 1.
        value (`Any`): A `dict` for most files, a `list` for a bare list of turns, a `str` for a bare prompt.
        unit (`str`, *optional*, defaults to `"line"`): `"line"` or `"row"`: what `line` counts.
    """

    line: int
    value: Any
    unit: str = "line"


@dataclass(frozen=True)
class RowError:
    """A row that could not be used, and why.

    Args:
        line (`int`): The line where it begins, or the row's number, counted from 1.
        kind (`str`): What is wrong in a few words, the same for all rows with this error.
        found (`str`): What is there.
        expected (`str`): What should be there.
        unit (`str`, *optional*, defaults to `"line"`): `"line"` or `"row"`: what `line` counts.
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


class BrokenFileError(ValueError):
    """Nothing after this point of a file can be read."""

    def __init__(self, place: str, found: str, expected: str) -> None:
        super().__init__(f"{place}: found {found}, expected {expected}.")


def shortened(value: Any, length: int = 60) -> str:
    """Return how a message shows what was found: on one line, and not the whole of a long text."""
    try:
        text = repr(value.strip()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = _DEEP
    return text if len(text) <= length else f"{text[:length]}…"


# ---- JSON


def read_json(text: TextIO, notes: Notes) -> Records:
    """Yield the rows of a JSON file: an array, JSON Lines, or one object around either."""
    start = text.read(_WHOLE + 1)
    is_array = start.lstrip()[:1] == "["
    first, _, others = start.strip().partition("\n")
    if len(start) <= _WHOLE and (is_array or not others or not _is_json(first)):
        try:
            yield from _document(start, notes) if is_array else list(_document(start, notes))
            return
        except BrokenFileError:
            if is_array or not any(line.startswith("{") and _is_json(line) for line in others.splitlines()):
                raise
    text.seek(0)
    yield from _stream_array(text) if is_array else read_json_lines(text, notes)


def read_json_lines(text: TextIO, notes: Notes) -> Records:
    """Yield the value of each line that is not blank; a file that is one document after all is read as that."""
    start = text.read(_WHOLE + 1)
    if len(start) <= _WHOLE and start.lstrip()[:1] in ("[", "{") and not _is_json(start.strip().partition("\n")[0]):
        guessed: Notes = []
        try:
            found = list(_document(start, guessed))
        except BrokenFileError:
            found = []
        if found and not any(isinstance(record, RowError) for record in found):
            notes += guessed or ["read as one JSON document, not as JSON Lines"]
            yield from found
            return
    text.seek(0)
    for line in _lines(text):
        yield from [line] if isinstance(line, RowError) else _values_of(line)


def _values_of(line: Record) -> Records:
    content = line.value.strip().rstrip(",")
    try:
        value = _loads(content)
    except json.JSONDecodeError as error:
        found = f"{shortened(line.value)} ({error.msg} at character {error.pos + 1})"
        quotes = " in double quotes, as `json.dumps` writes it" if content[:2] in ("{'", "['") else ""
        yield RowError(line.line, "not JSON", found, f"one whole JSON value a line{quotes}")
    except RecursionError:
        yield RowError(line.line, "not JSON", _DEEP, "a row")
    except _TwiceError as error:
        yield RowError(line.line, *error.args)
    except ValueError:  # which Python says of long numbers only
        yield RowError(line.line, *_LONG)
    else:
        yield from (Record(line.line, row) for row in (value if _is_table(value) else [value]))


def _document(text: str, notes: Notes) -> Records:
    """Yield the rows of one JSON text: an array, objects one after another, or one object in a shape of its own."""
    found = _values(text)
    if text.lstrip()[:1] != "[":
        values = list(found)
        if len(values) == 1 and isinstance(values[0], Record) and isinstance(values[0].value, dict):
            values = [Record(n, row, "row") for n, row in enumerate(_unwrapped(values[0].value, notes), 1)]
        found = iter(values)
    yield from found


def _values(text: str) -> Records:
    """Yield the values of an array, or those that follow each other."""
    position, number = _next(text, 0), 0
    is_array = text[position : position + 1] == "["
    position = _next(text, position + is_array)
    while position < len(text) and not (is_array and text[position] == "]"):
        number += 1
        record, position = _decoded(text, position, number)
        yield record
        separator = text[position : position + 1]
        if is_array and separator not in (",", "]"):
            raise BrokenFileError(_place(text, position, number), _around(text, position), "`,` or `]` after a row")
        position = _next(text, position + (separator == ","))
    if is_array and position == len(text):
        raise BrokenFileError(
            _place(text, position, number + 1), "the end of the file", "a row, or `]` after the last"
        )
    rest = _next(text, position + is_array)
    if rest < len(text):
        found = f"{_around(text, rest)} after the array"
        raise BrokenFileError(_place(text, rest, number), found, "the end, or a name in .jsonl")


def _next(text: str, position: int) -> int:
    """Return where the next character is that is no space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _decoded(text: str, position: int, number: int) -> tuple[Record | RowError, int]:
    """Return one value, and where the next may begin."""
    record: Record | RowError
    try:
        value, end = _DECODER.raw_decode(text, position)
        record = Record(number, value, "row")
    except json.JSONDecodeError as error:
        found = f"{_around(text, error.pos)} ({error.msg})"
        raise BrokenFileError(_place(text, error.pos, number), found, "a whole JSON value") from error
    except RecursionError as error:
        raise BrokenFileError(_place(text, position, number), _DEEP, "a row") from error
    except ValueError as error:
        _, end = json.JSONDecoder(parse_int=str).raw_decode(text, position)
        kind, what, expected = error.args if isinstance(error, _TwiceError) else _LONG
        record = RowError(number, kind, what, expected, "row")
    return record, _next(text, end)


def _unwrapped(value: dict[str, Any], notes: Notes) -> list[Any]:
    """Return the rows of one object: it may be a row, hold a list of them, or be a table by columns or by ids."""
    inner = list(value.values())
    tables = [name for name, content in value.items() if _is_table(content)]
    if len(tables) == 1:
        notes.append(f"the rows are taken from `{tables[0]}`")
        return list(value[tables[0]])
    if len(tables) > 1:
        raise BrokenFileError("one object", f"several lists of rows: {', '.join(tables)}", "one list, in a file")
    if inner and all(isinstance(content, dict) and content for content in inner):
        if all(key.isdecimal() for content in inner for key in content):  # as pandas writes a table, by columns
            notes.append("one object of columns, as pandas writes it, is read as rows")
            return [{name: value[name].get(key) for name in value} for key in inner[0]]
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


def _stream_array(text: TextIO) -> Records:
    """Yield the rows of an array that may be larger than memory."""
    import ijson  # type: ignore[import-untyped]

    number = 0
    try:
        for value in ijson.items(_FiniteNumbers(text), "item", use_float=True):
            number += 1
            yield Record(number, value, "row")
    except (ijson.JSONError, UnicodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        place = f"row {number + 1} (index {number})"
        raise BrokenFileError(place, f"what is no JSON in UTF-8 ({reason[:200]})", "a whole JSON value") from error


class _FiniteNumbers:
    """A JSON text as bytes in which NaN and Infinity outside of strings, which `json` writes, are null."""

    def __init__(self, text: TextIO) -> None:
        self.text, self.in_string = text, False

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` characters or a few more."""
        chunk = self.text.read(size)
        while chunk and chunk[-1] in "\\NaInfity-" and (more := self.text.read(1)):
            chunk += more
        if "NaN" in chunk or "Infinity" in chunk:
            chunk = re.sub(r'\\.|"|NaN|-?Infinity', self._replaced, chunk, flags=re.DOTALL)
        elif chunk.replace("\\\\", "").replace('\\"', "").count('"') % 2:
            self.in_string = not self.in_string
        return chunk.encode("utf-8", "surrogateescape")

    def _replaced(self, match: re.Match[str]) -> str:
        if match[0] == '"':
            self.in_string = not self.in_string
        return "null" if match[0][-1] in "Ny" and match[0][0] != "\\" and not self.in_string else match[0]


class _TwiceError(ValueError):
    """An object has one key twice, of which `json` would take the last without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError("a key twice", f"`{twice}` twice", "each key once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_loads = _DECODER.decode


def _is_json(line: str) -> bool:
    try:
        _loads(line.strip().rstrip(","))
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # it is, but cannot be used
        return True
    return True


def _around(text: str, position: int) -> str:
    return shortened(text[position : position + 60]) if text[position:].strip() else "the end of the file"


def _place(text: str, position: int, number: int) -> str:
    return f"row {number} (index {number - 1}), line {text.count(chr(10), 0, position) + 1}"


# ---- lines and tables


def read_plain_lines(text: TextIO, notes: Notes) -> Records:
    """Yield each line that is not blank as a bare prompt."""
    for line in _lines(text):
        yield line if isinstance(line, RowError) else Record(line.line, line.value.strip())


def _lines(text: TextIO) -> Records:
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


def read_csv(text: TextIO, delimiter: str | None, header: bool | None, notes: Notes) -> Records:
    """Yield one dictionary a row, with the names of the header or, without one, `"1"`, `"2"` and so on."""
    # A limit of the whole process, 128 KiB unless raised, which a long answer may exceed; it is never lowered here.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = _csv_lines(text)
    first, skipped = next(lines, ""), 0
    if setting := re.fullmatch(r'"?sep=(.)"?\s*', first):  # which Excel writes, and reads
        delimiter, first, skipped = setting[1], next(lines, ""), 1
    reader = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    names: list[str] | None = None
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
        if cells and names is None:
            names, cells = _header(cells, header, start, notes)
        if cells and len(cells) == len(names or ()):
            yield Record(start, dict(zip(names or (), cells, strict=True)))
        elif cells:
            expected = f"{len(names or ())}, as in the first line"
            yield RowError(start, "wrong number of cells", f"{len(cells)}", expected)
        start = reader.line_num + skipped + 1


def _header(cells: list[str], header: bool | None, line: int, notes: Notes) -> tuple[list[str], list[str]]:
    """Return the names of the columns, and the cells of the first row if it is none of names."""
    if header is None:
        header = looks_like_header(cells)
        if header is None:
            raise BrokenFileError(
                f"line {line}",
                f"{', '.join(map(repr, cells))}, which may be names of columns or a row",
                "to be told which, by `header=True` or `header=False`",
            )
        if not header and len(cells) > 1:
            notes.append(f"without a header: its first row is {shortened(', '.join(cells))}")
    names = [name.strip() for name in cells] if header else [str(n + 1) for n in range(len(cells))]
    if len(set(names)) < len(names):
        raise BrokenFileError(f"line {line}", f"the header {', '.join(names)}", "a different name for each column")
    return names, [] if header else cells


def _csv_lines(text: TextIO) -> Iterator[str]:
    number = 0
    while line := text.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            place = f"line {number}"
            raise BrokenFileError(place, f"more than {LONGEST:,} characters in one line", "line breaks between rows")
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
    words = [core.split() for core in cores]
    if len(cells) == 1:
        named = bool(words[0]) and len(words[0]) <= 3 and words[0][-1].removesuffix("s") in _NAMES
        return None if named else False
    is_text = [
        len(cell) > 60 or cell.strip()[-1:] in tuple(".!…\"'") or not re.search(r"[^\W\d]", cell) for cell in cells
    ]
    return False if any(is_text) else None


def _delimiter(line: str) -> str:
    """Return the separator that makes the first line a header; a comma where none does."""
    for delimiter in ",;\t|":
        cells = [cell.strip().strip('"') for cell in line.strip().split(delimiter)]
        if len(cells) > 1 and looks_like_header(cells):
            return delimiter
    return ","
