"""From files to training rows and prompt sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from . import formats
from .files import kind_of, read_records
from .formats import Columns, Format
from .hub import HubDataset, hub_dataset
from .overlap import DuplicateCounter, fingerprint
from .parsing import Record, RowError
from .reading import SHOWN, DataReport, ReadOptions, converted
from .rows import Kind, PromptSet, Row

if TYPE_CHECKING:
    from datasets import Dataset

STREAMED = 100_000
"""How many rows of a stream are read unless `ReadOptions.limit` says otherwise."""
CONTENT = ("prompt", "completion", "text")
"""The columns of a row that a model reads."""

_BATCH = 1024
_numbers = count()
_CATEGORIES = ("category", "type", "semanticcategory")
_XSTEST_LABELS = {"harmful": "unsafe", "borderline": "safe", "benign": "safe"}


def load_rows(path: str | Path | HubDataset, options: ReadOptions | None = None) -> tuple[Dataset, DataReport]:
    """Load training rows from a file or a dataset, in bounded memory.

    Args:
        path (`str`, `Path` or [`HubDataset`]): A file of JSON, JSON Lines, CSV, TSV or Parquet, also gzipped; or a
            dataset, written `hf:owner/name/subset:split` with subset and split as needed.
        options ([`ReadOptions`], *optional*): How to read it; left out, everything is found out from the file.

    Returns:
        `tuple[Dataset, DataReport]`: The rows, each `{"prompt": [...], "completion": [...]}` as TRL takes them (or
        `{"text": ...}`), in a file of their own that the dataset maps into memory; and what was found.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If rows cannot be used (unless they are to be skipped), or the file holds none at all, is in no
            known format or broken.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "rows.csv")
    >>> _ = path.write_text("instruction,output" + chr(10) + "Say hello,Hello!")
    >>> rows, report = load_rows(path)
    >>> rows[0]["completion"], report.format
    ([{'role': 'assistant', 'content': 'Hello!'}], 'alpaca')

    ```
    """
    source = _Source.of(path, options)
    return to_dataset(rows_of(source.records, source.options, source.report)), source.report


def as_rows(source: Any, *, argument: str = "rows", options: ReadOptions | None = None) -> tuple[Dataset, DataReport]:
    """Return the training rows of any source: the one conversion that every method, measurement and workflow uses.

    Args:
        source (`str`, `Path`, `HubDataset`, `Iterable[Mapping]`, `Dataset`, `DatasetDict` or `IterableDataset`): A
            file or a dataset as for [`load_rows`], or rows in memory in any format that files may have.
        argument (`str`, *optional*, defaults to `"rows"`): The caller's argument, which errors name.
        options ([`ReadOptions`], *optional*): How to read it.

    Returns:
        `tuple[Dataset, DataReport]`: As [`load_rows`]. The same content gives the same rows whatever holds it, so that
        the chat template applies alike.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is no source of rows.
        ValueError: As [`load_rows`]; names the argument and the row.

    Example:

    ```python
    >>> from safe_trainer.data import as_rows
    >>> rows, report = as_rows([{"prompt": "Say hello", "completion": "Hello!"}], argument="harmful_data")
    >>> rows[0]["prompt"], report.source
    ([{'role': 'user', 'content': 'Say hello'}], '`harmful_data`')

    ```
    """
    with named(argument):
        records, options, report = open_source(source, argument=argument, options=options)
        return to_dataset(rows_of(records, options, report)), report


def open_source(
    source: Any, *, argument: str = "rows", options: ReadOptions | None = None
) -> tuple[Iterator[Record | RowError], ReadOptions, DataReport]:
    """Return the records of any source, unconverted, with how to read them and a report to fill in.

    [`as_rows`] converts all of them; who needs each row next to its record gives them to [`converted_records`].
    """
    options = options or ReadOptions()
    if isinstance(source, str | Path | HubDataset):
        found = _Source.of(source, options)
        return found.records, found.options, found.report
    records, kind = _in_memory(source, argument, options)
    if kind == "stream":
        options = replace(options, limit=options.limit or STREAMED)
    return records, options, DataReport(f"`{argument}`", kind)


@contextmanager
def named(argument: str) -> Iterator[None]:
    """Name the caller's argument in every error about its source."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if f"`{argument}`" in str(error):
            raise
        raise type(error)(f"`{argument}`: {error}") from error


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
    return (Record(number, row, "row") for number, row in enumerate(source, 1)), kind


def rows_sha256(rows: Any) -> str:
    """Return the SHA-256 of what rows say: the same for every representation of the same rows.

    Args:
        rows: As for [`as_rows`].
    """
    digest = hashlib.sha256()
    for row in as_rows(rows)[0]:
        digest.update(json.dumps({name: row[name] for name in CONTENT if name in row}, sort_keys=True).encode())
    return digest.hexdigest()


def rows_of(records: Iterable[Record | RowError], options: ReadOptions, report: DataReport) -> Iterator[Row]:
    """Yield training rows one by one, and fill in the report.

    Args:
        records (`Iterable[Record | RowError]`): What the source holds, such as `read_records(path)` yields it.
        options ([`ReadOptions`]): How it is to be read.
        report ([`DataReport`]): Is filled in while the rows go by, the duplicates at the end.

    Raises:
        ValueError: As [`load_rows`].
    """
    seen = DuplicateCounter()
    for row in converted(records, options, report, formats.row_of):
        seen.add(row)
        yield row
    report.duplicates = seen.count()


def stream_rows(
    path: str | Path, options: ReadOptions | None = None, *, kept_troubles: int = SHOWN
) -> tuple[Iterator[Row], DataReport]:
    """Read training rows from a file one by one, for a caller who may stop at any of them.

    Args:
        path (`str` or `Path`): A file, as for [`load_rows`].
        options ([`ReadOptions`], *optional*): How to read it; left out, everything is found out from the file.
        kept_troubles (`int`, *optional*, defaults to `5`): How many rows that cannot be used the report keeps of each
            kind of trouble; it counts all of them.

    Returns:
        `tuple[Iterator[Row], DataReport]`: The rows, and a report that is filled in while they go by and complete when
        they have ended. The iterator raises what [`load_rows`] raises.

    Example:

    ```python
    rows, report = stream_rows("rows.csv", ReadOptions(on_bad_row="skip"))
    print(next(rows), report.format)
    ```
    """
    options = options or ReadOptions()
    report = DataReport(str(path), kind_of(path), kept=kept_troubles)
    return rows_of(read_records(path, options.encoding, options.header), options, report), report


def to_dataset(rows: Iterable[Row]) -> Dataset:
    """Return a dataset of the rows, which are written to a temporary Arrow file and mapped into memory from there.

    Args:
        rows (`Iterable[Row]`): At least one row; all of them conversations, or all of them texts.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = iter(rows)
    first = next(rows)
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([(name, pa.string() if name == "text" else turns) for name in first])
    path = Path(_spool().name, f"{next(_numbers)}.arrow")
    rows = chain([first], rows)
    with pa.ipc.new_stream(path, schema) as file:
        while batch := list(islice(rows, _BATCH)):
            file.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return Dataset.from_file(str(path))


@cache
def _spool() -> TemporaryDirectory[str]:
    """Return the folder that holds this process's rows; it goes when the process ends."""
    return TemporaryDirectory(prefix="safe_trainer_", ignore_cleanup_errors=True)


def load_prompts(
    path: str | Path | HubDataset, kind: Kind, name: str | None = None, options: ReadOptions | None = None
) -> tuple[PromptSet, DataReport]:
    """Load prompts to examine a model with.

    Any training format will do, and tables with a prompt column: `prompt,target`, `goal,target`, XSTest, lists of
    instructions, behaviours or questions, a CSV without a header, a text file with one prompt a line.

    Args:
        path (`str`, `Path` or [`HubDataset`]): The file; or a dataset, written
            `hf:owner/name/subset:split:column` with as many of the parts behind the name as it takes.
        kind (`str`): `"harmful"`, `"benign"`, `"borderline"` or `"task"`, whose answers are the references. Of XSTest,
            the unsafe prompts are taken for `"harmful"` and the safe ones otherwise.
        name (`str`, *optional*): Name of the set; left out, that of the file or dataset.
        options ([`ReadOptions`], *optional*): How to read the file; left out, everything is found out from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As [`load_rows`]; and for a task, if there are no answers.
    """
    return _prompts(_Source.of(path, options), kind, name)


def as_prompts(source: Any, kind: Kind, *, argument: str = "prompts", options: ReadOptions | None = None) -> PromptSet:
    """Return the prompts of any source, as [`as_rows`] returns rows.

    Args:
        source (`PromptSet`, `str`, `Path`, `HubDataset`, `Iterable` or `Dataset`): A prompt set, a file or dataset as
            for [`load_prompts`], or texts or rows in memory.
        kind (`str`): `"harmful"`, `"benign"`, `"borderline"` or `"task"`.
        argument (`str`, *optional*, defaults to `"prompts"`): The caller's argument, which errors name.
        options ([`ReadOptions`], *optional*): How to read it.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is no source of prompts.
        ValueError: As [`load_prompts`]; names the argument and the row.

    Example:

    ```python
    >>> from safe_trainer.data import as_prompts
    >>> as_prompts(["How do I bake bread?"], "benign").prompts
    ('How do I bake bread?',)

    ```
    """
    if isinstance(source, PromptSet):
        return source
    try:
        if isinstance(source, str | Path | HubDataset):
            return load_prompts(source, kind, options=options)[0]
        options = options or ReadOptions()
        records, found = _in_memory(source, argument, options)
        report = DataReport(f"`{argument}`", found)
        return _prompts(_Source(argument, argument, records, options, report), kind, argument)[0]
    except (FileNotFoundError, ValueError) as error:
        if f"`{argument}`" in str(error):
            raise
        raise type(error)(f"`{argument}`: {error}") from error


def _prompts(source: _Source, kind: Kind, name: str | None) -> tuple[PromptSet, DataReport]:
    report, options = source.report, source.options
    records = chain(first := list(islice(source.records, 1)), source.records)
    if options.where is None and _is_xstest(first) and kind in _XSTEST_LABELS:
        options = replace(options, where={"label": _XSTEST_LABELS[kind]})
    found = list(converted(records, options, report, _examined))
    report.duplicates = len(found) - len({fingerprint(prompt) for prompt, _, _ in found})
    prompts, answers, categories = zip(*found, strict=True)
    if kind == "task" and None in answers:
        line = answers.index(None) + 1
        raise ValueError(
            f"`{report.source}` has no answer to prompt {line}. A task needs the right answer to each prompt."
        )
    return (
        PromptSet(
            name or source.name,
            kind,
            prompts,
            categories if all(categories) else None,
            answers if kind == "task" else None,
            source=source.shown,
        ),
        report,
    )


@dataclass(frozen=True)
class _Source:
    """Where records come from, and how they are to be read."""

    name: str
    shown: str
    """What others may know of it: the id of a dataset, or the name of a file without its folders."""
    records: Iterator[Record | RowError]
    options: ReadOptions
    report: DataReport

    @classmethod
    def of(cls, path: str | Path | HubDataset, options: ReadOptions | None) -> _Source:
        options = options or ReadOptions()
        dataset = path if isinstance(path, HubDataset) else hub_dataset(path)
        if dataset is None:
            assert not isinstance(path, HubDataset)  # which has been taken care of
            file, records = Path(path).name, read_records(path, options.encoding, options.header)
            return cls(file.split(".")[0], file, records, options, DataReport(str(path), kind_of(path)))
        dataset = replace(dataset, subset=dataset.subset or options.subset, split=dataset.split or options.split)
        if dataset.column is not None:
            options = replace(options, format=None, columns={"prompt": dataset.column})
        folder = Path(dataset.name).name
        shown = replace(dataset, name=folder) if dataset.is_folder else dataset
        return cls(folder, str(shown), dataset.records(), options, DataReport(str(dataset), "dataset"))


def _examined(style: Format, columns: Columns) -> tuple[str, str | None, str | None]:
    prompt, answer = formats.prompt_of(style, columns)
    categories = (columns[name] for name in _CATEGORIES if columns.get(name))
    return prompt, answer, _category(next(categories, None))


def _category(value: object) -> str | None:
    if isinstance(value, dict):  # BeaverTails: a flag for each category
        return ", ".join(name for name, flag in value.items() if flag) or "none"
    return str(value) if value is not None else None


def _is_xstest(records: list[Record | RowError]) -> bool:
    record = records[0] if records else None
    if not isinstance(record, Record) or not isinstance(record.value, dict):
        return False
    style = formats.format_of(formats.columns_of(record.value))
    return style is not None and style.name == "xstest"
