"""How sources are read: the options, the report, and the way from records to what is wanted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from . import formats
from .formats import Answers, Columns, Conversation, Format, Row
from .labels import with_class_names
from .loaders import HubDataset, hub_dataset, kind_of, read_records
from .parsing import BadRowError, Record, Records, RowError

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnBadRow = Literal["raise", "skip"]
Source = Any  # a path, `hf:owner/name/subset:split:column`, a `HubDataset`, rows in memory, or a dataset of any kind

STREAMED = 100_000  # rows of a stream that are read unless `ReadOptions.limit` says otherwise
_SHOWN = 5  # examples of each kind of error that a report keeps
_VOTERS = 100  # records that are asked which format a file is in


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read; everything that is left out is found out from it.

    Args:
        format (`str`, *optional*): Name of a format, such as `"alpaca"`; see `safe_trainer.data.formats.FORMATS`.
        columns (`Mapping[str, str]`, *optional*): Instead of a format, which columns hold the `"prompt"`, the
            `"answer"`, a `"context"` after the prompt and the `"system"` prompt; without a header, `"1"`, `"2"` etc.
        where (`Mapping[str, Any]`, *optional*): Takes only the rows that have these values in these columns, such as
            `{"is_safe": False}`; of a list of values, any.
        encoding (`str`, *optional*): Such as `"latin-1"`; left out, Unicode.
        on_bad_row (`str`, *optional*, defaults to `"raise"`): `"raise"` refuses a file with rows that cannot be used,
            after naming them; `"skip"` goes on without them and reports them all the same.
        limit (`int`, *optional*): Uses the first `limit` rows only; of a stream, 100,000 unless set.
        subset (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*): Split of a dataset on the Hub, or of a `DatasetDict`.
        header (`bool`, *optional*): Whether a CSV or TSV file begins with names of columns.
        answers (`str`, *optional*, defaults to `"last"`): Which answers of a conversation are learned: `"last"`, or
            `"all"`, each as a row of its own. A file's own marks (`weight`, `train`) go first.
        system_prompt (`str`, *optional*): Of training rows, a system turn to put before each of them. Rows that have
            one of their own, or are texts, cannot be used then.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    where: Mapping[str, Any] | None = None
    encoding: str | None = None
    on_bad_row: OnBadRow = "raise"
    limit: int | None = None
    subset: str | None = None
    split: str | None = None
    header: bool | None = None
    answers: Answers = "last"
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.columns is not None:
            raise ValueError("Give `format` or `columns`, not both: a format knows its columns.")
        for name, choices in (("on_bad_row", get_args(OnBadRow)), ("answers", get_args(Answers))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}.")
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ValueError("`system_prompt` is empty. Leave it out to put no system turn before the rows.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}. Leave it out to take all rows.")

    def chosen_format(self) -> Format | None:
        """Return the format that the user has chosen, or `None` if it is to be found out."""
        if self.columns is not None:
            return formats.format_with(self.columns)
        return formats.format_named(self.format) if self.format else None

    @property
    def has_header(self) -> bool | None:
        """Whether a table begins with names; `None` if that is to be found out."""
        if self.header is not None or not self.columns:
            return self.header
        return not all(name.isdecimal() for name in self.columns.values())


@dataclass
class DataReport:
    """What was found in one source of data; `str()` of it is for people."""

    source: str  # path of the file, name of the dataset, or the argument that rows were given as
    kind: str  # such as "CSV"
    format: str = "unknown"  # that its rows are in, such as "alpaca"
    rows: int = 0  # that can be used
    filtered: int = 0  # left aside by `where`, or as no part of a published set
    other_kind: Counter[str] = field(default_factory=Counter)  # prompts left out, by what they are labelled as
    duplicates: int = 0  # rows that are the same as an earlier one, but for case, punctuation and spaces
    troubles: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by what is wrong with them
    examples: list[RowError] = field(default_factory=list)  # the first five of each kind
    notes: list[str] = field(default_factory=list)  # what was guessed about the source
    unused: Counter[str] = field(default_factory=Counter)  # columns with content, by the number of rows that have it
    answers: int = 0  # turns by the assistant
    learned: int = 0  # how many of these are learned
    answer_characters: int = 0
    learned_characters: int = 0

    @property
    def learned_share(self) -> float | None:
        """The share of the answers' characters that is learned, from 0 to 1; `None` for texts."""
        return self.learned_characters / self.answer_characters if self.answer_characters else None

    def add(self, error: RowError) -> None:
        """Count a row that cannot be used."""
        self.troubles[error.kind] += 1
        if self.troubles[error.kind] <= _SHOWN:
            self.examples.append(error)

    def count(self, conversation: Conversation, rows: list[Row]) -> None:
        """Count the answers of a record, and those that its rows learn."""
        answers = conversation.answers
        self.answers += len(answers)
        self.answer_characters += sum(len(turn.content) for turn in answers)
        learned = [row["completion"][0]["content"] for row in rows if "completion" in row]
        self.learned += len(learned)
        self.learned_characters += sum(map(len, learned))

    def warnings(self, advice: str = ". To learn each of them, read with `answers='all'`") -> list[str]:
        """Return what the rows do not say any more, or were taken for; `advice` on how to learn all answers."""
        found = list(self.notes)
        for label, count in self.other_kind.items():
            found.append(f"left out {count:,} of {self.rows + count:,} prompts, which are labelled {label}")
        if self.learned < self.answers:
            found.append(
                f"{self.learned:,} of {self.answers:,} answers are learned ({self.learned_share or 0:.0%} of their "
                f"text); the others are context{advice}"
            )
        if self.unused:
            found.append(f"not used: {', '.join(f'`{name}`' for name in sorted(self.unused))}")
        return found

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.kind}, {self.format}: {self.rows:,} rows"]
        parts += [f"{self.duplicates:,} duplicates"] if self.duplicates else []
        parts += [f"{self.filtered:,} left aside by `where`"] if self.filtered else []
        parts += [f"{count:,} unusable ({kind})" for kind, count in self.troubles.most_common()]
        lines = [", ".join(parts), *(f"  {error}" for error in self.examples), *(f"  {n}" for n in self.warnings())]
        return "\n".join(lines)


class OpenSource(NamedTuple):
    """A source that is about to be read; `name` is for sets of prompts, `shown` is what others may know of it."""

    records: Records
    options: ReadOptions
    report: DataReport
    name: str
    shown: str

    def converted(self, convert: Callable[[Format, Columns], T]) -> Iterator[tuple[Record, T]]:
        """Yield each record with what `convert` makes of it, and fill in the report.

        Raises:
            ValueError: At the beginning, if the records are in no known format; at the end, if there were none, or
                some that cannot be used and are not to be skipped.
        """
        records, options, report, *_ = self
        first = list(islice(records, _VOTERS))
        style = options.chosen_format() or _elected_format(first, report)
        report.format = style.name
        for record in chain(first, records):
            if options.limit is not None and report.rows >= options.limit:
                break
            if isinstance(record, RowError):
                report.add(record)
                continue
            try:
                columns = formats.columns_of(record.value)
                if not _is_wanted(columns, options.where or {}):
                    report.filtered += 1
                    continue
                result = convert(style, columns)
            except BadRowError as error:
                report.add(error.of(record))
                continue
            report.rows += 1
            yield record, result
        _conclude(options, report)


@contextmanager
def named(argument: str) -> Iterator[None]:
    """Name the caller's argument in every error about its source."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if f"`{argument}" in str(error):
            raise
        raise type(error)(f"`{argument}`: {error}") from error


def open_source(source: Source, *, argument: str = "rows", options: ReadOptions | None = None) -> OpenSource:
    """Return the records of any source, with how to read them and a report to fill in."""
    options = options or ReadOptions()
    dataset = hub_dataset(source) if isinstance(source, str | Path) else source
    if isinstance(source, str | Path) and dataset is None:
        file, report = Path(source).name, DataReport(str(source), kind_of(source))
        records = read_records(source, options.encoding, options.has_header, report.notes)
        return OpenSource(records, options, report, file.split(".")[0], file)
    if not isinstance(dataset, HubDataset):
        held, kind = _in_memory(source, argument, options)
        if kind == "stream":
            options = replace(options, limit=options.limit or STREAMED)
        return OpenSource(held, options, DataReport(argument, kind), argument, argument)
    dataset = replace(dataset, split=dataset.split or options.split, subset=dataset.subset or options.subset)
    if dataset.column is not None:
        options = replace(options, format=None, columns={"prompt": dataset.column})
    records, dataset = dataset.load()
    folder = Path(dataset.name).name
    shown = replace(dataset, name=folder) if dataset.is_folder else dataset
    return OpenSource(records, options, DataReport(str(dataset), "dataset"), folder, str(shown))


def _in_memory(source: Any, argument: str, options: ReadOptions) -> tuple[Iterator[Record], str]:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(source, DatasetDict | IterableDatasetDict):
        if options.split is None and len(source) > 1:
            example = f"`{argument}[{next(iter(source))!r}]`"
            raise ValueError(f"`{argument}` has the splits {', '.join(source)}. Choose one, as in {example}.")
        if options.split is not None and options.split not in source:
            raise ValueError(f"`{argument}` has no split {options.split!r}; it has {', '.join(source)}.")
        source = source[options.split or next(iter(source))]
    kind = "dataset" if isinstance(source, Dataset) else "rows"
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        kind = "stream"
    if isinstance(source, Mapping) or not hasattr(source, "__iter__"):
        raise TypeError(
            f"`{argument}` must be a file, a dataset or a list of rows, got {type(source).__name__}. Give for example "
            '[{"prompt": "...", "completion": "..."}].'
        )
    return (Record(number, row, "row") for number, row in enumerate(with_class_names(source), 1)), kind


def _elected_format(records: list[Record | RowError], report: DataReport) -> Format:
    """Let the first records vote, so that a bad one among them does not decide."""
    if not records:
        header = " after its header" if report.kind in ("CSV", "TSV") else ""
        raise ValueError(f"`{report.source}` holds no rows{header}. Give at least one.")
    votes: Counter[Format] = Counter()
    errors = [record for record in records if isinstance(record, RowError)]
    seen: list[str] = []
    for record in records:
        if isinstance(record, Record) and isinstance(record.value, Mapping | list | str):
            try:
                columns = formats.columns_of(record.value)
                if style := formats.format_of(columns):
                    votes[style] += 1
                else:
                    formats.check_no_preference(columns)
                seen = list(columns)
            except BadRowError as error:
                errors.append(error.of(record))
    if votes:
        return votes.most_common(1)[0][0]
    for bad in errors:
        report.add(bad)
    if report.troubles and not seen:
        raise ValueError(f"No row can be used.\n{report}")
    found = f"columns {', '.join(seen)}" if seen else "values that are no rows"
    guessed = "".join(f" ({note})" for note in report.notes)
    known = "; ".join(f"{style.name} ({', '.join(style.columns)})" for style in formats.FORMATS if not style.alone)
    raise ValueError(
        f"`{report.source}` is in no known format: found {found}{guessed}. Name its `columns`, as in "
        f"{{'prompt': 'question', 'answer': 'reply'}}, or bring it into one of these formats: {known}."
    )


def _is_wanted(columns: Columns, where: Mapping[str, Any]) -> bool:
    for given, value in where.items():
        name = given.strip().lower()
        if name not in columns:
            raise BadRowError("other columns", ", ".join(columns) or "none", f"`{given}`, which `where` asks for")
        choices = value if isinstance(value, list | tuple | set) else [value]
        found = str(columns[name]).strip().lower()  # a CSV says "False" for what JSON calls false
        if found not in {str(choice).lower() for choice in choices}:
            return False
    return True


def _conclude(options: ReadOptions, report: DataReport) -> None:
    bad = report.troubles.total()
    if not report.rows:
        raise ValueError(f"No row can be used.\n{report}")
    if bad and options.on_bad_row == "raise":
        raise ValueError(
            f"{bad:,} of {bad + report.rows + report.filtered:,} rows cannot be used.\n{report}\n"
            "Fix them, or leave them out with `on_bad_row='skip'`."
        )
    if bad:
        logger.warning("Going on without %d rows that cannot be used.\n%s", bad, report)
