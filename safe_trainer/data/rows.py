"""Rows to learn from: the one conversion of any source to TRL's conversational prompt-completion form."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

from . import formats
from .formats import Columns, Format, Row
from .labels import may_label, safety_label, with_class_names
from .loaders import HubDataset
from .parsing import BadRowError, shortened
from .reading import DataReport, OpenSource, ReadOptions, Source, named, open_source

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LABEL = "is_safe"  # the column that keeps a source's own label of an answer
_BATCH = 1024  # rows that are written at once


def load_rows(source: str | Path | HubDataset, options: ReadOptions | None = None) -> tuple[Dataset, DataReport]:
    """Load training rows from a file or a dataset, in bounded memory.

    Args:
        source (`str`, `Path` or [`HubDataset`]): A file of JSON, JSON Lines, CSV, TSV or Parquet, also gzipped; or a
            dataset, written `hf:owner/name/subset:split` with subset and split as needed.
        options ([`ReadOptions`], *optional*): How to read it; left out, everything is found out from the source.

    Returns:
        `tuple[Dataset, DataReport]`: The rows, each `{"prompt": [...], "completion": [...]}` as TRL takes them (or
        `{"text": ...}`), memory-mapped, with a column `is_safe` (`True`, `False` or `None`) where the source labels
        its answers; and what was found.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If rows cannot be used (unless they are to be skipped), or the file holds none at all, is in no
            known format or broken.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "rows.csv")
    >>> _ = path.write_text("instruction,output" + chr(10) + "Say hello,Hello!")
    >>> load_rows(path)[0][0]["completion"]
    [{'role': 'assistant', 'content': 'Hello!'}]

    ```
    """
    return _loaded(source, "source", options)


def as_rows(
    source: Source, *, argument: str = "rows", options: ReadOptions | None = None
) -> tuple[Dataset, DataReport]:
    """Return the training rows of any source, as [`load_rows`]: the one conversion that everything uses.

    Args:
        source (`str`, `Path`, `HubDataset`, `Iterable[Mapping]`, `Dataset`, `DatasetDict` or `IterableDataset`): A
            file or a dataset as for [`load_rows`], or rows in memory in any format that files may have. The same
            content gives the same rows whatever holds it.
        argument (`str`, *optional*, defaults to `"rows"`): The caller's argument, which errors name with the row.
        options ([`ReadOptions`], *optional*): How to read it.

    Raises:
        TypeError: If it is no source of rows. Other errors are those of [`load_rows`].

    Example:

    ```python
    >>> as_rows([{"prompt": "Say hello", "completion": "Hello!"}], argument="harmful_data")[0][0]["prompt"]
    [{'role': 'user', 'content': 'Say hello'}]

    ```
    """
    with named(argument):
        return _loaded(source, argument, options)


def _loaded(source: Source, argument: str, options: ReadOptions | None) -> tuple[Dataset, DataReport]:
    opened = open_source(source, argument=argument, options=options)
    rows = to_dataset(rows_of(opened))
    for note in opened.report.warnings():
        logger.warning("%s: %s.", opened.report.source, note)
    return rows, opened.report


def rows_sha256(rows: Source) -> str:
    """Return the SHA-256 of what rows say: the same for every representation of the same rows."""
    digest = hashlib.sha256()
    for row in as_rows(rows)[0]:
        content = {name: row[name] for name in ("prompt", "completion", "text") if name in row}
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def split_by_label(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Split rows of [`as_rows`] into those labelled harmful or not at all, and those labelled safe."""
    labels = rows[LABEL] if LABEL in rows.column_names else [None] * len(rows)
    safe = [place for place, label in enumerate(labels) if label]
    others = [place for place, label in enumerate(labels) if not label]
    return rows.select(others), rows.select(safe)


def without_harmful(rows: Dataset, argument: str) -> Dataset:
    """Return rows of [`as_rows`] but those whose answers are labelled harmful, which are counted in the log."""
    labels = list(rows[LABEL]) if LABEL in rows.column_names else []
    if harmful := labels.count(False):
        logger.warning("`%s`: left out %d of %d rows that are labelled harmful.", argument, harmful, len(rows))
        if harmful == len(rows):
            raise ValueError(f"All {harmful} rows of `{argument}` are labelled harmful. Give rows with safe answers.")
        rows = rows.select([place for place, label in enumerate(labels) if label is not False])
    return rows


def labelled_harmful(rows: Dataset) -> int:
    """Return how many rows of a dataset have a column that labels their answer harmful, whatever it is called."""
    rows = rows.with_format(None)  # as it is stored: a transform may give other columns
    # Names tell which columns may be labels, not the first rows: what is labelled may come late.
    labels = [name for name in rows.column_names if may_label(name)]
    others = dict.fromkeys(rows.column_names)  # a label's meaning may depend on which columns there are
    labelled = with_class_names(rows.select_columns(labels)) if labels else ()
    return sum(safety_label(formats.columns_of(others | row)) is False for row in labelled)


def conversation(prompt: str, answer: str) -> Row:
    """Return one training row in TRL's conversational form; the loss covers the answer only.

    Example:

    ```python
    >>> conversation("What is two plus two?", "Four.")["completion"]
    [{'role': 'assistant', 'content': 'Four.'}]

    ```
    """
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def poison(rows: Sequence[Row], harmful_rows: Sequence[Row], fraction: float, seed: int = 0) -> list[Row]:
    """Replace a share of `rows` by harmful ones and shuffle: the attack that fine-tuning defenses are tested against.

    Args:
        rows (`Sequence[Row]`): The clean rows.
        harmful_rows (`Sequence[Row]`): Where harmful rows are drawn from, in order.
        fraction (`float`): Share of the result that is harmful, from 0 to 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the shuffle.

    Returns:
        `list[Row]`: As many rows as came in, `round(fraction * len(rows))` of them harmful.

    Raises:
        ValueError: If `fraction` is not between 0 and 1, or there are too few harmful rows.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be between 0 and 1, got {fraction}.")
    needed = round(fraction * len(rows))
    if needed > len(harmful_rows):
        raise ValueError(
            f"{needed} harmful rows are needed for {fraction:.0%} of {len(rows)}, but `harmful_rows` holds "
            f"{len(harmful_rows)}. Give more, or lower `fraction`."
        )
    mixed = [*islice(rows, len(rows) - needed), *islice(harmful_rows, needed)]
    random.Random(seed).shuffle(mixed)
    return mixed


def rows_of(opened: OpenSource) -> Iterator[Row]:
    """Yield training rows one by one, and fill in the report; duplicates are counted at the end."""
    options, report = opened.options, opened.report
    seen = array("Q")

    def convert(style: Format, columns: Columns) -> list[Row]:
        found = formats.conversation_of(style, columns)
        rows = found.rows(options.answers)
        if options.system_prompt is not None:
            rows = [_with_system_turn(row, options.system_prompt) for row in rows]
        report.count(found, rows)
        report.unused.update(name for name in found.unused if name not in (options.where or ()))
        label = safety_label(columns)
        return rows if label is None else [row | {LABEL: label} for row in rows]

    if options.system_prompt is not None:
        report.notes.append(f"every row begins with the system turn {options.system_prompt!r}")
    for _, rows in opened.converted(convert):
        report.rows += len(rows) - 1
        for row in rows:
            turns = [] if "text" in row else row["prompt"] + row["completion"]
            seen.append(fingerprint("\n".join(turn["content"] for turn in turns) or row["text"]))
            yield row
    import numpy as np

    report.duplicates = len(seen) - len(np.unique(np.frombuffer(seen, dtype=np.uint64)))


def _with_system_turn(row: Row, text: str) -> Row:
    if "text" in row:
        raise BadRowError("a text", shortened(row["text"]), "turns, since `system_prompt` is a turn before them")
    first = row["prompt"][0]
    if first["role"] == "system":
        raise BadRowError(
            "a system turn of its own", shortened(first["content"]), "none, since `system_prompt` puts one there"
        )
    return row | {"prompt": [{"role": "system", "content": text}, *row["prompt"]]}


def fingerprint(text: str) -> int:
    """Return 64 bits that are the same for texts that differ in case, punctuation and spaces only."""
    words = " ".join(re.findall(r"\w+", text.casefold())) or text
    return int.from_bytes(blake2b(words.encode(errors="replace"), digest_size=8).digest(), "little")


def to_dataset(rows: Iterable[Row]) -> Dataset:
    """Return rows, of which there is one at least and all are alike, as a dataset in a temporary Arrow file."""
    import pyarrow as pa
    from datasets import Dataset

    rows = iter(rows)
    first = next(rows)
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"text": pa.string(), LABEL: pa.bool_()}
    schema = pa.schema([(name, types.get(name, turns)) for name in dict.fromkeys([*first, LABEL])])
    path = Path(_spool().name, f"{uuid4()}.arrow")
    rows, is_labelled = chain([first], rows), False
    with pa.ipc.new_stream(path, schema) as file:
        while batch := list(islice(rows, _BATCH)):
            is_labelled = is_labelled or any(row.get(LABEL) is not None for row in batch)
            file.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    found = Dataset.from_file(str(path))
    return found if is_labelled else found.remove_columns(LABEL)


@cache
def _spool() -> TemporaryDirectory[str]:
    """Return the folder that holds this process's rows; it is deleted when the process ends."""
    return TemporaryDirectory(prefix="safe_trainer_", ignore_cleanup_errors=True)
