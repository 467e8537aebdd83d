"""From files to training rows and prompt sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from . import formats
from .files import kind_of, read_records
from .formats import Columns, Format
from .hub import HubDataset, hub_dataset
from .overlap import DuplicateCounter, fingerprint
from .parsing import Record, Trouble
from .reading import SHOWN, Reading, Report, converted
from .rows import Kind, PromptSet, Row

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1024
_numbers = count()
_CATEGORIES = ("category", "type", "semanticcategory")
_XSTEST_LABELS = {"harmful": "unsafe", "borderline": "safe", "benign": "safe"}


def load_rows(path: str | Path | HubDataset, reading: Reading | None = None) -> tuple[Dataset, Report]:
    """Load training rows from a file or a dataset, in bounded memory.

    Args:
        path (`str`, `Path` or [`HubDataset`]): A file of JSON, JSON Lines, CSV, TSV or Parquet, also gzipped; or a
            dataset, written `hf:owner/name/subset:split` with subset and split as needed.
        reading ([`Reading`], *optional*): How to read it; left out, everything is found out from the file.

    Returns:
        `tuple[Dataset, Report]`: The rows, each `{"prompt": [...], "completion": [...]}` as TRL takes them (or
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
    source = _Source.of(path, reading)
    return to_dataset(rows_of(source.records, source.reading, source.report)), source.report


def rows_of(records: Iterable[Record | Trouble], reading: Reading, report: Report) -> Iterator[Row]:
    """Yield training rows one by one, and fill in the report.

    Args:
        records (`Iterable[Record | Trouble]`): What the source holds, such as `read_records(path)` yields it.
        reading ([`Reading`]): How it is to be read.
        report ([`Report`]): Is filled in while the rows go by, the duplicates at the end.

    Raises:
        ValueError: As [`load_rows`].
    """
    seen = DuplicateCounter()
    for row in converted(records, reading, report, formats.row_of):
        seen.add(row)
        yield row
    report.duplicates = seen.count()


def stream_rows(
    path: str | Path, reading: Reading | None = None, *, kept_troubles: int = SHOWN
) -> tuple[Iterator[Row], Report]:
    """Read training rows from a file one by one, for a caller who may stop at any of them.

    Args:
        path (`str` or `Path`): A file, as for [`load_rows`].
        reading ([`Reading`], *optional*): How to read it; left out, everything is found out from the file.
        kept_troubles (`int`, *optional*, defaults to `5`): How many rows that cannot be used the report keeps of each
            kind of trouble; it counts all of them.

    Returns:
        `tuple[Iterator[Row], Report]`: The rows, and a report that is filled in while they go by and whole when they
        have ended. The iterator raises what [`load_rows`] raises.

    Example:

    ```python
    rows, report = stream_rows("rows.csv", Reading(on_bad_row="skip"))
    print(next(rows), report.format)
    ```
    """
    reading = reading or Reading()
    report = Report(str(path), kind_of(path), kept=kept_troubles)
    return rows_of(read_records(path, reading.encoding, reading.header), reading, report), report


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
    path: str | Path | HubDataset, kind: Kind, name: str | None = None, reading: Reading | None = None
) -> tuple[PromptSet, Report]:
    """Load prompts to examine a model with.

    Any training format will do, and tables with a prompt column: `prompt,target`, `goal,target`, XSTest, lists of
    instructions, behaviours or questions, a CSV without a header, a text file with one prompt a line.

    Args:
        path (`str`, `Path` or [`HubDataset`]): The file; or a dataset, written
            `hf:owner/name/subset:split:column` with as many of the parts behind the name as it takes.
        kind (`str`): `"harmful"`, `"benign"`, `"borderline"` or `"task"`, whose answers are the references. Of XSTest,
            the unsafe prompts are taken for `"harmful"` and the safe ones otherwise.
        name (`str`, *optional*): Name of the set; left out, that of the file or dataset.
        reading ([`Reading`], *optional*): How to read the file; left out, everything is found out from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As [`load_rows`]; and for a task, if there are no answers.
    """
    source = _Source.of(path, reading)
    report, reading = source.report, source.reading
    records = chain(first := list(islice(source.records, 1)), source.records)
    if reading.where is None and _is_xstest(first) and kind in _XSTEST_LABELS:
        reading = replace(reading, where={"label": _XSTEST_LABELS[kind]})
    found = list(converted(records, reading, report, _examined))
    report.duplicates = len(found) - len({fingerprint(prompt) for prompt, _, _ in found})
    prompts, answers, categories = zip(*found, strict=True)
    if kind == "task" and None in answers:
        line = answers.index(None) + 1
        raise ValueError(f"`{path}` has no answer to prompt {line}. A task needs the right answer to each prompt.")
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
    records: Iterator[Record | Trouble]
    reading: Reading
    report: Report

    @classmethod
    def of(cls, path: str | Path | HubDataset, reading: Reading | None) -> _Source:
        reading = reading or Reading()
        dataset = path if isinstance(path, HubDataset) else hub_dataset(path)
        if dataset is None:
            assert not isinstance(path, HubDataset)  # which has been taken care of
            file, records = Path(path).name, read_records(path, reading.encoding, reading.header)
            return cls(file.split(".")[0], file, records, reading, Report(str(path), kind_of(path)))
        if dataset.column is not None:
            reading = replace(reading, format=None, columns={"prompt": dataset.column})
        folder = Path(dataset.name).name
        shown = replace(dataset, name=folder) if dataset.is_folder else dataset
        return cls(folder, str(shown), dataset.records(), reading, Report(str(dataset), "dataset"))


def _examined(style: Format, columns: Columns) -> tuple[str, str | None, str | None]:
    prompt, answer = formats.prompt_of(style, columns)
    categories = (columns[name] for name in _CATEGORIES if columns.get(name))
    return prompt, answer, _category(next(categories, None))


def _category(value: object) -> str | None:
    if isinstance(value, dict):  # BeaverTails: a flag for each category
        return ", ".join(name for name, flag in value.items() if flag) or "none"
    return str(value) if value is not None else None


def _is_xstest(records: list[Record | Trouble]) -> bool:
    record = records[0] if records else None
    if not isinstance(record, Record) or not isinstance(record.value, dict):
        return False
    style = formats.format_of(formats.columns_of(record.value))
    return style is not None and style.name == "xstest"
