"""From records to rows and prompts: how a file is read, and the report on every row that could not be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, TypeVar

from . import formats
from .formats import BadRowError, Columns, Format
from .parsing import Record, RowError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OnBadRow = Literal["raise", "skip"]

_VOTERS = 100  # records that are asked which format a file is in
SHOWN = 5  # examples of each kind of trouble that a report keeps


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read; everything that is left out is found out from the file.

    Args:
        format (`str`, *optional*): Name of a format, such as `"alpaca"`; see `safe_trainer.data.formats.FORMATS`.
        columns (`Mapping[str, str]`, *optional*): Instead of a format, which columns hold the `"prompt"`, the
            `"answer"`, a `"context"` behind the prompt and the `"system"` prompt. In a file without a header the
            columns are called `"1"`, `"2"` and so on.
        where (`Mapping[str, Any]`, *optional*): Takes only the rows that have these values in these columns, such as
            `{"is_safe": False}`.
        encoding (`str`, *optional*): Such as `"latin-1"`; left out, Unicode.
        on_bad_row (`str`, *optional*, defaults to `"raise"`): `"raise"` refuses a file with rows that cannot be used,
            after naming them; `"skip"` goes on without them and reports them all the same.
        limit (`int`, *optional*): Uses the first `limit` rows only; of a stream, 100,000 unless more are asked for.
        subset (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*): Split of a dataset on the Hub, or of a `DatasetDict`.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    where: Mapping[str, Any] | None = None
    encoding: str | None = None
    on_bad_row: OnBadRow = "raise"
    limit: int | None = None
    subset: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.columns is not None:
            raise ValueError("Give `format` or `columns`, not both: a format knows its columns.")
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"`on_bad_row` must be 'raise' or 'skip', got {self.on_bad_row!r}.")

    def chosen_format(self) -> Format | None:
        """Return the format that the user has chosen, or `None` if it is to be found out."""
        if self.columns is not None:
            return formats.format_with(self.columns)
        return formats.format_named(self.format) if self.format else None

    @property
    def header(self) -> bool | None:
        """Whether a table begins with names; `None` if that is to be found out."""
        return False if self.columns and all(name.isdecimal() for name in self.columns.values()) else None


@dataclass
class DataReport:
    """What was found in one source of data; `str()` of it is for people.

    Args:
        source (`str`): Path of the file, or name of the dataset.
        kind (`str`): Such as `"CSV"`.
        format (`str`): The format that its rows are in.
        rows (`int`): How many rows can be used.
        filtered (`int`): How many were left aside by `where`.
        duplicates (`int`): How many of the rows are the same as an earlier one, but for case, punctuation and spaces.
        troubles (`Counter[str]`): How many rows cannot be used, by what is wrong with them.
        examples (`list[RowError]`): The first of these of each kind.
        kept (`int`): How many of each kind that are.
    """

    source: str
    kind: str
    format: str = "unknown"
    rows: int = 0
    filtered: int = 0
    duplicates: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    examples: list[RowError] = field(default_factory=list)
    kept: int = SHOWN

    def add(self, trouble: RowError) -> None:
        """Count a row that cannot be used."""
        self.troubles[trouble.kind] += 1
        if self.troubles[trouble.kind] <= self.kept:
            self.examples.append(trouble)

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.kind}, {self.format}: {self.rows:,} rows"]
        parts += [f"{self.duplicates:,} duplicates"] if self.duplicates else []
        parts += [f"{self.filtered:,} left aside by `where`"] if self.filtered else []
        parts += [f"{count:,} unusable ({kind})" for kind, count in self.troubles.most_common()]
        return "\n".join([", ".join(parts), *(f"  {trouble}" for trouble in self.examples)])


def converted(
    records: Iterable[Record | RowError],
    reading: ReadOptions,
    report: DataReport,
    convert: Callable[[Format, Columns], T],
) -> Iterator[T]:
    """Yield what `convert` makes of each record, and fill in the report; see [`converted_records`]."""
    return (result for _, result in converted_records(records, reading, report, convert))


def converted_records(
    records: Iterable[Record | RowError],
    reading: ReadOptions,
    report: DataReport,
    convert: Callable[[Format, Columns], T],
) -> Iterator[tuple[Record, T]]:
    """Yield each record with what `convert` makes of it, and fill in the report.

    Args:
        records (`Iterable[Record | RowError]`): What the source holds.
        reading ([`ReadOptions`]): How it is to be read.
        report ([`DataReport`]): Is filled in while the records go by.
        convert (`Callable`): From a format and a record's columns to what is wanted; raises [`BadRowError`].

    Raises:
        ValueError: At the beginning, if the records are in no known format; at the end, if there were none, or some
            that cannot be used and are not to be skipped.
    """
    records = iter(records)
    first = list(islice(records, _VOTERS))
    style = reading.chosen_format() or _elected_format(first, report)
    report.format = style.name
    for record in chain(first, records):
        if reading.limit is not None and report.rows >= reading.limit:
            break
        if isinstance(record, RowError):
            report.add(record)
            continue
        try:
            columns = formats.columns_of(record.value)
            if not _is_wanted(columns, reading.where or {}):
                report.filtered += 1
                continue
            result = convert(style, columns)
        except BadRowError as error:
            report.add(RowError(record.line, error.kind, error.found, error.expected, record.unit))
            continue
        report.rows += 1
        yield record, result
    _conclude(reading, report)


def _elected_format(records: list[Record | RowError], report: DataReport) -> Format:
    """Let the first records vote, so that a bad one among them does not decide."""
    votes: Counter[Format] = Counter()
    seen: list[str] = []
    for record in records:
        if isinstance(record, Record) and isinstance(record.value, dict | list | str):
            seen = list(formats.columns_of(record.value))
            votes.update(filter(None, [formats.format_of(seen)]))
    if votes:
        return votes.most_common(1)[0][0]
    troubles = [str(record) for record in records if isinstance(record, RowError)]
    found = f"columns {', '.join(seen)}" if seen else troubles[0] if troubles else "no rows"
    known = "; ".join(f"{style.name} ({', '.join(style.columns)})" for style in formats.FORMATS if not style.alone)
    raise ValueError(
        f"`{report.source}` is in no known format: found {found}. Name its `columns`, as in {{'prompt': 'question', "
        f"'answer': 'reply'}}, or bring it into one of these formats: {known}."
    )


def _is_wanted(columns: Columns, where: Mapping[str, Any]) -> bool:
    for name, value in where.items():
        if name not in columns:
            raise BadRowError("other columns", ", ".join(columns) or "none", f"`{name}`, which `where` asks for")
        if str(columns[name]).strip().lower() != str(value).lower():  # a CSV says "False" for what JSON calls false
            return False
    return True


def _conclude(reading: ReadOptions, report: DataReport) -> None:
    bad = report.troubles.total()
    if bad and reading.on_bad_row == "raise":
        raise ValueError(
            f"{bad:,} of {bad + report.rows + report.filtered:,} rows cannot be used.\n{report}\n"
            "Mend them, or leave them out with `on_bad_row='skip'`."
        )
    if not report.rows:
        raise ValueError(f"No row can be used.\n{report}")
    if bad:
        logger.warning("Going on without %d rows that cannot be used.\n%s", bad, report)
