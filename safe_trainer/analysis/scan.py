"""Ranking rows before training: which share of a row's loss do security vectors take away?"""

from __future__ import annotations

import csv
import json
import logging
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..artifacts import TrainedVectors, active, row_losses
from ..artifacts.fitting import frozen
from ..artifacts.provenance import with_tokenizer
from ..data import (
    BadRowError,
    Columns,
    DataReport,
    EncodedRow,
    Format,
    ReadOptions,
    Record,
    Row,
    RowError,
    collate,
    converted_records,
    encode_row,
    formats,
    kind_of,
    read_records,
)
from ..evaluation.statistics import Rate
from ..lora.updates import LinearLayer

logger = logging.getLogger(__name__)


def precision_recall(
    scores: ArrayLike, is_harmful: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the curve over all thresholds at which rows with a score at or above them are taken for harmful.

    Args:
        scores (`ArrayLike`): A score for each row, larger for more harm.
        is_harmful (`ArrayLike`): The truth.

    Returns:
        `tuple`: Precision, recall and threshold, from the highest threshold to the lowest. Equal scores share one.

    Raises:
        ValueError: If the two differ in length, or no row is harmful.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_harmful, bool)
    if values.shape != truth.shape:
        raise ValueError(f"There are {values.size} scores for {truth.size} labels. Give one of each for every row.")
    if not truth.any():
        raise ValueError("No row is labelled harmful, so there is nothing to be found.")
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    last = np.r_[np.flatnonzero(np.diff(values)), len(values) - 1]  # of each group of equal scores
    found = np.cumsum(truth)[last]
    return found / (last + 1), found / truth.sum(), values[last]


def average_precision(scores: ArrayLike, is_harmful: ArrayLike) -> float:
    """Return the average precision `Σ (R_n − R_{n−1}) P_n`: 1 if every harmful row stands above every other.

    Args:
        scores (`ArrayLike`): A score for each row, larger for more harm.
        is_harmful (`ArrayLike`): The truth.

    Raises:
        ValueError: As [`precision_recall`].

    Example:

    ```python
    >>> average_precision([0.9, 0.8, 0.1, 0.0], [True, False, True, False])
    0.8333333333333333

    ```
    """
    precision, recall, _ = precision_recall(scores, is_harmful)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


_KNOWN = 0.05  # nats per token
_BATCHES = 4  # rows of so many batches are sorted by length, so that a batch holds little padding


class Score(NamedTuple):
    """How much of a row the vectors know already."""

    loss: float
    """Mean loss over the answer's tokens, in nats, of the clean model."""
    loss_with_vectors: float
    """The same with the vectors at work."""

    @property
    def drop(self) -> float:
        """By how much the vectors lower the loss, in nats per token."""
        return self.loss - self.loss_with_vectors

    @property
    def share(self) -> float:
        """Which share of the loss the vectors take away: near 1 where the row teaches what they were fitted to.

        The drop alone misleads: on a task that is new to the model the loss is large, and vectors move it by nats for
        no reason. A loss below 0.05 counts as 0.05, since a row that the model knows already teaches nothing.
        """
        return self.drop / max(self.loss, _KNOWN)


def score_rows(
    rows: Iterable[Row],
    model: nn.Module,
    vectors: TrainedVectors | str | Path,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> Iterator[Score | None]:
    """Score rows one after the other, in bounded memory.

    Rows that teach the harm that the vectors were fitted to are those whose loss falls far when the vectors are at
    work. The model is only touched while a batch is computed; between two scores, and whenever the iteration ends, it
    is as it was.

    Args:
        rows (`Iterable[dict]`): Rows with `prompt` and `completion`, or `text`; any number of them.
        model (`PreTrainedModel` or `PeftModel`): The model that would be trained.
        vectors ([`TrainedVectors`], `str` or `Path`): Vectors made for it, or where they are.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batch_size (`int`, *optional*, defaults to `16`): Rows in one forward pass.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.

    Yields:
        [`Score`] or `None`: In the rows' order; `None` for a row without an answer within `max_length`.

    Raises:
        ValueError: If the vectors do not fit the model, the tokenizer has no chat template, or a setting is out of
            its range.

    Example:

    ```python
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from safe_trainer import score_rows, testbed, train_security_vectors

    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED)
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)
    vectors = train_security_vectors(model, testbed.harmful_rows(100), tokenizer)
    rows = testbed.harmful_rows(2, seed=1) + testbed.task_rows("sentiment", 2)
    print([score.share for score in score_rows(rows, model, vectors, tokenizer)])
    ```
    """
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    found = vectors if isinstance(vectors, TrainedVectors) else TrainedVectors.load(vectors)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("`tokenizer` has no chat template, without which rows cannot be put into the model's form.")
    scorer = _Scorer(model, found.check_fits(model), found, tokenizer, batch_size, max_length)
    source = iter(rows)
    windows = iter(lambda: list(islice(source, _BATCHES * batch_size)), [])
    return (score for window in windows for score in scorer.scores(window))


@dataclass(frozen=True)
class _Scorer:
    model: Any
    layers: Mapping[str, LinearLayer]
    vectors: TrainedVectors
    tokenizer: Any
    batch_size: int
    max_length: int

    def scores(self, rows: Sequence[Row]) -> list[Score | None]:
        """Return the scores of a few batches of rows."""
        encoded = [self._encoded(row) for row in rows]
        usable = sorted((len(one.ids), place, one) for place, one in enumerate(encoded) if one is not None)
        scores: list[Score | None] = [None] * len(rows)
        for start in range(0, len(usable), self.batch_size):
            batch = usable[start : start + self.batch_size]
            for (_, place, _), score in zip(batch, self._batch([one for *_, one in batch]), strict=True):
                scores[place] = score
        return scores

    def _batch(self, encoded: Sequence[EncodedRow]) -> Iterator[Score]:
        device = self.model.get_input_embeddings().weight.device
        batch = collate(encoded, self.tokenizer.pad_token_id or 0, device)
        with frozen(self.model), active(self.layers, self.vectors.modules) as switch:
            with_vectors = row_losses(self.model, batch).tolist()
            with switch.off():
                clean = row_losses(self.model, batch).tolist()
        return map(Score, clean, with_vectors)

    def _encoded(self, row: Row) -> EncodedRow | None:
        try:
            return encode_row(self.tokenizer, row, self.max_length)
        except ValueError:
            return None


class Spool:
    """Entries in a temporary file, to be read back from the highest score to the lowest.

    In memory stay 16 bytes for each entry: its score, and where it lies.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()
        self._scores, self._places = array("d"), array("q")

    def __enter__(self) -> Spool:
        """Return itself; the file goes when the context ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._scores)

    def add(self, score: float, entry: dict[str, Any]) -> None:
        """Keep an entry; values that JSON does not know, such as dates, are kept as text. Not after [`ranked`]."""
        encoded = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        self._places.append(self._file.tell())
        self._scores.append(score)
        self._file.write(encoded + b"\n")

    @property
    def scores(self) -> NDArray[np.float64]:
        """Return the scores in the order in which they came."""
        return np.array(self._scores)

    def above(self, threshold: float) -> int:
        """Return how many entries have a score above the threshold."""
        return int((self.scores > threshold).sum())

    def ranked(self) -> Iterator[dict[str, Any]]:
        """Yield the entries from the highest score to the lowest, each with its `rank` from 1."""
        for rank, index in enumerate(np.argsort(-self.scores, kind="stable"), 1):
            self._file.seek(self._places[index])
            yield {"rank": rank, **json.loads(self._file.readline().decode("utf-8", "surrogatepass"))}


Entries = Iterable[dict[str, Any]]

COLUMNS = ("rank", "line", "share", "drop", "loss", "loss_with_vectors", "prompt", "answer", "row")
"""What a table holds; `row` is the original row, in CSV and Parquet as JSON text."""

_BATCH = 1024


def check_output(path: str | Path) -> Path:
    """Return the path if a table can be written to it.

    Raises:
        ValueError: If its name ends in something else than `.csv`, `.jsonl` or `.parquet`.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"`output` must end in one of {', '.join(_WRITERS)}, got `{path}`.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for `output`. Make it first.")
    return path


def write_table(path: Path, entries: Entries) -> Path:
    """Write a table under its name once all of it is written; a file of that name is untouched until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _WRITERS[path.suffix.lower()](temporary, entries)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _write_json_lines(path: Path, entries: Entries) -> None:
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_csv(path: Path, entries: Entries) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_flat, entries))


def _write_parquet(path: Path, entries: Entries) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kinds = {"rank": pa.int64(), "line": pa.int64(), "share": pa.float64(), "drop": pa.float64()}
    kinds |= {"loss": pa.float64(), "loss_with_vectors": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    entries = iter(entries)
    with ParquetWriter(path, schema) as writer:
        while batch := [_flat(entry) for entry in islice(entries, _BATCH)]:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    row = json.dumps(entry["row"], ensure_ascii=False)
    return {**entry, "row": row.encode("utf-8", "replace").decode()}


_WRITERS: dict[str, Callable[[Path, Entries], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}


_YES = {"1", "true", "yes", "harmful", "unsafe"}


@dataclass
class ScanResult:
    """What a scan found.

    Args:
        report ([`~data.DataReport`]): What was read, and which rows could not be used, by line.
        scored (`int`): How many rows have a score.
        threshold (`float`): The share of its loss that the vectors take away, above which a row looks harmful.
        above ([`Rate`] or `None`): How many do; `None` if no row has a score.
        top (`list[dict]`): The highest ranks, each with `rank`, `line`, `share`, `drop`, `loss`, `loss_with_vectors`,
            `prompt`, `answer` and `row`.
        interrupted (`bool`): Whether Ctrl-C ended it; what was done until then is here and in the table.
        average_precision (`float` or `None`): Of the ranking, where there are labels.
        curve (`list[tuple[float, float, float]]`): Precision, recall and threshold, from the highest threshold down.
    """

    report: DataReport
    scored: int = 0
    threshold: float = 0.5
    above: Rate | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    average_precision: float | None = None
    curve: list[tuple[float, float, float]] = field(default_factory=list)


def scan_file(  # noqa: PLR0913, each is a setting with a name
    path: str | Path,
    model: Any,
    vectors: TrainedVectors | str | Path,
    tokenizer: Any = None,
    *,
    output: str | Path | None = None,
    reading: ReadOptions | None = None,
    label: str | None = None,
    threshold: float = 0.5,
    top: int = 20,
    batch_size: int = 16,
    max_length: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> ScanResult:
    """Rank the rows of a file by the share of their loss that security vectors take away: most of it for harm.

    The file is read twice: once to find rows that cannot be used, before any model is loaded, and once row by row to
    score them. Memory does not grow with it but for 17 bytes a row; the scored rows wait on disk for their order.

    Args:
        path (`str` or `Path`): Training rows in any file that [`~data.load_rows`] reads.
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The model that would be trained, or where it is.
        vectors ([`TrainedVectors`], `str` or `Path`): Vectors made for it, or where they are.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; loaded from where the model came from if left
            out.
        output (`str` or `Path`, *optional*): A `.csv`, `.jsonl` or `.parquet` file for all rows in their order of
            rank, with their scores.
        reading ([`~data.ReadOptions`], *optional*): How to read it; by default a row that cannot be used ends it.
        label (`str`, *optional*): A column that says which rows are harmful, to see how good the ranking is.
        threshold (`float`, *optional*, defaults to `0.5`): The share of its loss above which a row looks harmful.
        top (`int`, *optional*, defaults to `20`): How many of the highest ranks to return.
        batch_size (`int`, *optional*, defaults to `16`): Rows in one forward pass.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.
        progress (`Callable[[int, int], None]`, *optional*): Called with (scored, total) rows.

    Returns:
        [`ScanResult`]: On Ctrl-C with what was done until then, which the table holds as well.

    Raises:
        FileNotFoundError: If there is no such file, or no folder for `output`.
        ValueError: If rows cannot be used and are not to be skipped, `output` is of no known kind, or the vectors do
            not fit the model.

    Example:

    ```python
    from safe_trainer import scan_file

    result = scan_file("rows.jsonl", "Qwen/Qwen2.5-0.5B-Instruct", "vectors", output="ranked.csv")
    print(result.above, result.top[0]["prompt"])
    ```
    """
    table = check_output(output) if output is not None else None
    source = _Source(Path(path), reading or ReadOptions(), label)
    report = source.check()
    found = vectors if isinstance(vectors, TrainedVectors) else TrainedVectors.load(vectors)
    base, tokenizer = with_tokenizer(model, tokenizer)
    result = ScanResult(report, threshold=threshold)
    labels = array("b")
    scores = score_rows(source.rows(), base, found, tokenizer, batch_size=batch_size, max_length=max_length)
    with Spool() as spool:
        try:
            for done, score in enumerate(scores, 1):
                record, row, is_harmful = source.waiting.popleft()
                if score is None:
                    found_none = f"none in {max_length} tokens"
                    report.add(RowError(record.line, "answer out of reach", found_none, "an answer"))
                else:
                    spool.add(score.share, _entry(record, row, score))
                    labels.append(is_harmful)
                if progress is not None:
                    progress(done, report.rows)
        except KeyboardInterrupt:
            if not len(spool):
                raise
            result.interrupted = True
            logger.warning("Interrupted after %d of %d rows; these are kept.", len(spool), report.rows)
        _conclude(result, spool, labels if label is not None else None)
        result.top = list(islice(spool.ranked(), top))
        if table is not None:
            write_table(table, spool.ranked())
    return result


class _Source:
    """The file's rows, and beside each of them what a table needs."""

    def __init__(self, path: Path, reading: ReadOptions, label: str | None) -> None:
        self.path, self.reading, self.label = path, reading, label and label.strip().lower()
        self.waiting: deque[tuple[Record, Row, bool]] = deque()
        """Records of the rows that were handed out, in order, until their scores come."""

    def check(self) -> DataReport:
        """Read all of it once."""
        report = DataReport(str(self.path), kind_of(self.path))
        deque(self._read(report), maxlen=0)
        return report

    def rows(self) -> Iterator[Row]:
        """Yield the rows."""
        for record, (row, is_harmful) in self._read(DataReport(str(self.path), kind_of(self.path))):
            self.waiting.append((record, row, is_harmful))
            yield row

    def _read(self, report: DataReport) -> Iterator[tuple[Record, tuple[Row, bool]]]:
        records = read_records(self.path, self.reading.encoding, self.reading.header)
        return converted_records(records, self.reading, report, self._convert)

    def _convert(self, style: Format, columns: Columns) -> tuple[Row, bool]:
        row = formats.row_of(style, columns)
        if self.label is None:
            return row, False
        if self.label not in columns:
            raise BadRowError("no label", ", ".join(columns), f"a column `{self.label}`")
        value = columns[self.label]
        return row, value.strip().lower() in _YES if isinstance(value, str) else bool(value)


def _entry(record: Record, row: Row, score: Score) -> dict[str, Any]:
    prompt, answer = (_text(row.get(part, "")) for part in ("prompt", "completion"))
    losses = {
        "share": score.share,
        "drop": score.drop,
        "loss": score.loss,
        "loss_with_vectors": score.loss_with_vectors,
    }
    return {"line": record.line, **losses, "prompt": prompt, "answer": answer or row.get("text"), "row": record.value}


def _text(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def _conclude(result: ScanResult, spool: Spool, labels: array[int] | None) -> None:
    result.scored = len(spool)
    if len(spool):
        result.above = Rate(spool.above(result.threshold), len(spool))
    if labels is not None and any(labels):
        result.average_precision = average_precision(spool.scores, labels)
        result.curve = [
            (float(precision), float(recall), float(threshold))
            for precision, recall, threshold in zip(*precision_recall(spool.scores, labels), strict=True)
        ]
