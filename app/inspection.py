"""What is in an uploaded file: read in a process of its own with limits, so that no file can hold up the server."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from safe_trainer import load_rows
from safe_trainer.data import (
    DataReport,
    ReadOptions,
    encode_row,
    labelled_harmful,
    leaked_rows,
    lost_turns,
    read_records,
    with_class_names,
)

from . import texts
from .setup import EXAMPLES, Example, Limits, Model, built_in_prompts

logger = logging.getLogger(__name__)

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SAMPLES, SHOWN_TOKENS, MEASURED = 3, 500, 300
"""Rows that are shown, tokens of each side of them, and rows whose tokens are counted."""
_OPTION = re.compile(r"`(where|columns|encoding|header|answers|on_bad_row)\b")
_MEASURING = 3.0  # seconds for counting tokens
_MEMORY = 8 * 2**30  # bytes of address space on top of what the libraries take
_context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")


class Unusable(ValueError):
    """A file that cannot be used; `columns` are those to choose from, where choosing may help."""

    def __init__(self, message: str, columns: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.columns = columns

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross the border between processes with the columns."""
        return Unusable, (str(self), self.columns)


class Sample(NamedTuple):
    """A row as the model will see it: what is read and what is learned, as text and token by token."""

    read: str
    learned: str
    read_tokens: Sequence[str]
    learned_tokens: Sequence[str]


@dataclass(frozen=True)
class Inspection:
    """What was found in a file.

    Args:
        path (`Path`): Where it is, in the session's folder.
        name (`str`): What the user called it.
        example ([`Example`], *optional*): Which example it is.
        reading (`Mapping[str, Any]`): The user's `columns` and `encoding`.
        columns (`tuple[str, ...]`): Names of its columns.
        format (`str`): Kind of file and format.
        rows (`int`): Rows that can be used.
        bad (`int`): Rows that cannot.
        troubles (`tuple[tuple[str, ...], ...]`): Kind, count, first lines, found and expected of these.
        duplicates (`int`): Rows that are the same as an earlier one.
        lengths (`tuple[int, ...]`): Tokens of a random sample of rows.
        samples (`tuple[Sample, ...]`): The first rows as the model will see them.
        leaked (`Mapping[str, int]`): By prompt set, how many rows ask the same.
        notes (`tuple[str, ...]`): What was guessed about the file, and what of it is not learned.
    """

    path: Path
    name: str
    example: Example | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    format: str = ""
    rows: int = 0
    bad: int = 0
    troubles: tuple[tuple[str, ...], ...] = ()
    duplicates: int = 0
    lengths: tuple[int, ...] = ()
    samples: tuple[Sample, ...] = ()
    leaked: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def median(self) -> int:
        """Median number of tokens of a row."""
        return round(statistics.median(self.lengths)) if self.lengths else 0


def write_lines(lines: Iterable[Any], target: Path) -> int:
    """Write rows as JSON Lines, and return their number."""
    count = 0
    with target.open("w", encoding="utf-8") as file:
        for count, line in enumerate(lines, 1):  # noqa: B007
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return count


def ending_of(name: str, endings: Sequence[str] = ENDINGS) -> str:
    """Return the ending of a file's name if we read such files."""
    ending = Path(name).suffix.lower()
    if ending not in endings:
        raise ValueError(texts.WRONG_KIND.format(endings=", ".join(endings)))
    return ending


def inspect(
    path: Path,
    name: str,
    model: Model,
    limits: Limits,
    example: Example | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Inspection:
    """Look through a file of training rows."""
    reading = dict(reading or {})
    tokenizer = tokenizer_of(model)
    columns = columns_of(path, reading.get("encoding"))
    rows, report = read_file(path, name, limits, columns, lambda: load_rows(path, _options(reading)))
    if len(rows) > limits.rows:
        raise Unusable(texts.TOO_MANY_ROWS.format(count=len(rows), limit=limits.rows))
    leaked = {s.name: len(leaked_rows(rows, s)) for s in built_in_prompts(model, example)}
    by_kind: dict[str, list[Any]] = {}
    for trouble in report.examples:
        by_kind.setdefault(trouble.kind, []).append(trouble)
    return Inspection(
        path,
        name,
        example,
        reading,
        columns,
        f"{report.kind}, {report.format}",
        report.rows,
        report.troubles.total(),
        tuple(
            (kind, f"{report.troubles[kind]:,}", _lines(found), found[0].found[:300], _expected(found[0])[:300])
            for kind, found in by_kind.items()
        ),
        report.duplicates,
        _lengths(tokenizer, rows),
        _samples(tokenizer, rows),
        {name: count for name, count in leaked.items() if count},
        _notes(tokenizer, rows, report),
    )


def _notes(tokenizer: Any, rows: Any, report: DataReport) -> tuple[str, ...]:
    """Return what was guessed about a file, and what training on its rows would do."""
    harmful, lost = labelled_harmful(rows), lost_turns(tokenizer, rows)
    found = report.warnings(advice="")  # which the page has no place for
    found += [texts.LABELLED.format(count=harmful, rows=len(rows))] if harmful else []
    return tuple(found + ([texts.LOST.format(what=lost)] if lost else []))


def _options(reading: Mapping[str, Any]) -> ReadOptions:
    return ReadOptions(columns=reading.get("columns"), encoding=reading.get("encoding"), on_bad_row="skip")


def read_file(path: Path, name: str, limits: Limits, columns: tuple[str, ...], load: Callable[[], Any]) -> Any:
    """Load a file, with errors that fit the page and speak of the user's name for it."""
    ending_of(path.name)
    try:
        if path.suffix.lower() == ".parquet":
            _check_unpacked(path, limits)
        return load()
    except ValueError as error:
        told = str(error).replace(str(path), name).splitlines()
        first, *more = [line for line in told if "on_bad_row" not in line]  # which the page has no place for
        message = f"{first} {_without_options(more[-1].strip())}." if more else first
        if "encoding" in message or "not UTF-" in message:
            message = f"{message if more else first.split('. ')[0].rstrip('.') + '.'} {texts.CHOOSE_ENCODING}"
        elif columns and ("column" in message or "format" in message):
            message = f"{message if more else first.split('. ')[0].rstrip('.') + '.'} {texts.CHOOSE_COLUMNS}"
        raise Unusable(message, columns) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken file makes of a parser
        logger.info("An uploaded file could not be read: %s", type(error).__name__)
        raise Unusable(texts.UNREADABLE.format(name=type(error).__name__), columns) from None


def _check_unpacked(path: Path, limits: Limits) -> None:
    """Refuse a small Parquet file that becomes large: other formats do not grow."""
    from pyarrow.parquet import ParquetFile

    total = 0
    for batch in ParquetFile(path).iter_batches(batch_size=100, use_threads=False):
        columns = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns)
        total += sum(column.nbytes for column in columns)
        if total > limits.characters:
            raise Unusable(texts.TOO_MUCH.format(limit=limits.characters))


def columns_of(path: Path, encoding: str | None = None) -> tuple[str, ...]:
    """Return the names of a file's columns; in JSON, any row may have one that others have not."""
    names: dict[str, None] = {}
    looked_at = 1 if path.suffix.lower() in (".csv", ".tsv", ".parquet") else None
    with suppress(Exception):  # what is wrong with the file is said when it is read
        for record in islice(read_records(path, encoding), looked_at):
            value = getattr(record, "value", None)
            names |= dict.fromkeys(map(str, value)) if isinstance(value, dict) else {}
    return tuple(names)[:100]


def first_rows(path: Path, name: str, model: Model, limits: Limits, reading: Mapping[str, Any]) -> tuple[Sample, ...]:
    """Return the first rows as the model will see them, without looking at the others."""
    options = replace(_options(reading), limit=SAMPLES)
    rows, _ = read_file(path, name, limits, (), lambda: load_rows(path, options))
    return _samples(tokenizer_of(model), rows)


def _samples(tokenizer: Any, rows: Any) -> tuple[Sample, ...]:
    found = []
    for row in rows.select(range(min(SAMPLES, len(rows)))):
        encoded = encode_row(tokenizer, row)
        start = encoded.answer_start if "text" not in row else 0
        sides = encoded.ids[:start], encoded.ids[start:]
        tokens = ([tokenizer.decode([one]) for one in side[:SHOWN_TOKENS]] for side in sides)
        found.append(Sample(*map(tokenizer.decode, sides), *tokens))
    return tuple(found)


def _lengths(tokenizer: Any, rows: Any) -> tuple[int, ...]:
    """Return the tokens of a random sample of rows."""
    lengths: list[int] = []
    end = time.monotonic() + _MEASURING
    for number in random.Random(0).sample(range(len(rows)), min(MEASURED, len(rows))):
        lengths.append(len(encode_row(tokenizer, rows[number]).ids))
        if time.monotonic() > end:
            break
    return tuple(lengths)


def fetch(source: Sequence[Any], target: Path, limits: Limits, token: bool | None) -> None:
    """Download rows of a dataset on the Hub, with its own columns, as JSON Lines.

    Args:
        source (`Sequence`): Name, subset or `""`, split, first row (from 1) and number of rows.
        target (`Path`): Where to write.
        limits ([`Limits`]): What is let in.
        token (`bool`, *optional*): `False` for what everybody can read only.
    """
    from datasets import load_dataset

    name, subset, split, first, count = source
    characters = 0
    try:
        rows = load_dataset(name, subset or None, split=split, streaming=True, token=token)
        with target.open("w", encoding="utf-8") as file:
            for row in islice(with_class_names(rows), first - 1, first - 1 + count):
                characters += file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                if characters > limits.characters:
                    raise Unusable(texts.TOO_MUCH.format(limit=limits.characters))
    except Unusable:
        raise
    except Exception as error:  # what `datasets`, the network and the readers of files raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unusable(texts.HUB_FAILED.format(name=name, reason=reason[:300].rstrip("."))) from None


def _expected(trouble: Any) -> str:
    return _without_options(trouble.expected)


def _without_options(text: str) -> str:
    """Return what a row should be, without advice on options that the page calls otherwise or has no place for."""
    pieces = re.split(r"(?<=[,;:]) ", text)
    return " ".join(takewhile(lambda piece: not _OPTION.search(piece), pieces)).rstrip(",;:")


def _lines(troubles: list[Any]) -> str:
    return ", ".join(str(trouble.line) for trouble in troubles)


def example_called(key: str) -> Example:
    """Return an example by its key."""
    if key not in EXAMPLES:
        raise ValueError(texts.NO_DATA)
    return EXAMPLES[key]


def tokenizer_of(model: Model) -> Any:
    """Load a model's tokenizer; no code that comes with a model is ever run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(texts.TOKENIZER_LOST.format(message=message[:300])) from None


def warm_up() -> None:
    """Start the process that the others are made from, with the libraries that take long to import."""
    if sys.platform != "win32":
        from multiprocessing import forkserver

        _context.set_forkserver_preload(["datasets", "transformers", "pyarrow.parquet", __name__])
        forkserver.ensure_running()


def apart(seconds: float, function: Callable[..., Any], *args: Any) -> Generator[None, None, Any]:
    """Call a function in a process of its own, which ends when the generator is closed.

    It yields while the function works, and returns what it returned. It raises `ValueError` if that did, or took more
    than so many seconds or too much memory.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_answer, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while not receiver.poll(0.2):
            if time.monotonic() > end:
                raise Unusable(texts.TOO_SLOW)
            yield
        try:
            result, error = receiver.recv()
        except EOFError:
            raise Unusable(texts.TOO_SLOW) from None
        if error is not None:
            raise error
        return result
    finally:
        process.kill()
        process.join()


def _answer(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Send what a function returns or raises; the body of the process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY,) * 2)
    try:
        sender.send((function(*args), None))
    except MemoryError:
        sender.send((None, Unusable(texts.TOO_SLOW)))
    except ValueError as error:
        sender.send((None, error if type(error) in (ValueError, Unusable) else ValueError(str(error))))
    except Exception as error:
        sender.send((None, ValueError(texts.UNEXPECTED.format(name=type(error).__name__))))
