"""From a file of rows to a table of them, ranked by how harmful they look."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...artifacts import TrainedVectors
from ...artifacts.provenance import with_tokenizer
from ...data import formats
from ...data.files import kind_of, read_records
from ...data.formats import BadRowError, Columns, Format
from ...data.parsing import Record, RowError
from ...data.reading import DataReport, ReadOptions, converted_records
from ...data.rows import Row
from ...evaluation.statistics import Rate
from .curve import average_precision, precision_recall
from .ranking import Spool
from .scoring import Score, score_rows
from .tables import check_output, write_table

logger = logging.getLogger(__name__)

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
