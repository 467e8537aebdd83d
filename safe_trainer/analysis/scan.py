"""Scan: rank rows before training by how much of their loss security vectors take away."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..artifacts.fitting import row_losses
from ..artifacts.provenance import describe, model_and_tokenizer
from ..artifacts.security_vectors import TrainedVectors, active
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
    TemplateError,
    collate,
    conversation_of,
    encode_row,
    named,
    open_source,
    safety_label,
)
from ..data.labels import FLAGS
from ..data.reading import STREAMED, OpenSource
from ..evaluation.statistics import Rate
from ..lora.modes import evaluation_mode, input_device
from .scan_files import Scores, check_clean, check_output, write_clean, write_table

logger = logging.getLogger(__name__)

T = TypeVar("T")

THRESHOLD = 0.5
"""The share of its loss above which a row looks harmful, where neither a threshold nor labels are given."""

_KNOWN = 0.05  # nats per token
_BATCHES = 4  # rows of this many batches are sorted by length, so that a batch holds little padding


class Score(NamedTuple):
    """How much of a row the vectors know already."""

    loss: float
    """Mean loss over the answer's tokens, in nats, of the clean model."""
    loss_with_vectors: float
    """The same with the vectors active."""

    @property
    def drop(self) -> float:
        """By how much the vectors lower the loss, in nats per token."""
        return self.loss - self.loss_with_vectors

    @property
    def share(self) -> float:
        """Which share of the loss the vectors take away: near 1 where the row teaches what they were fitted to.

        A loss below 0.05 counts as 0.05: a row that the model knows already teaches nothing.
        """
        return self.drop / max(self.loss, _KNOWN)


def score_rows(
    rows: Any,
    model: nn.Module,
    vectors: TrainedVectors | str | Path,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> Iterator[Score | None]:
    """Score rows lazily, in bounded memory; between two scores, and when the iteration ends, the model is as it was.

    Args:
        rows: Rows in any format that [`~data.as_rows`] takes; an iterator may be endless.
        model (`PreTrainedModel` or `PeftModel`): The model that would be trained.
        vectors ([`TrainedVectors`], `str` or `Path`): Vectors made for it, or where they are.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batch_size (`int`, *optional*, defaults to `16`): Rows in one forward pass.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.

    Yields:
        [`Score`] or `None`: In the rows' order; `None` for a row without an answer within `max_length`.
    """
    scorer = _Scorer(model, vectors, tokenizer, batch_size, max_length)

    def convert(style: Format, columns: Columns) -> Row | None:
        try:
            return conversation_of(style, columns).rows()[-1]
        except BadRowError:
            return None

    opened = open_source(rows)
    opened = opened._replace(options=replace(opened.options, on_bad_row="skip", limit=None))
    outcomes = scorer.outcomes(opened.converted(convert))
    return (outcome if isinstance(outcome, Score) else None for _, outcome in outcomes)


class _Scorer:
    def __init__(self, model: Any, vectors: Any, tokenizer: Any, batch_size: int, max_length: int) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        found = vectors if isinstance(vectors, TrainedVectors) else TrainedVectors.load(vectors)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("`tokenizer` has no chat template. Set `tokenizer.chat_template` to the model's.")
        if found.provenance.get("report", {}).get("reached_target") is False:
            logger.warning("These `vectors` were not fitted to their target loss: harmful rows may rank low.")
        self.model, self.layers, self.vectors, self.tokenizer = model, found.check_fits(model), found, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    def outcomes(self, rows: Iterable[tuple[T, Row | None]]) -> Iterator[tuple[T, Score | ValueError]]:
        """Yield a score for each row, or why it has none, next to what the row came with."""
        rows = iter(rows)
        while window := list(islice(rows, _BATCHES * self.batch_size)):
            yield from zip((known for known, _ in window), self.window([row for _, row in window]), strict=True)

    def window(self, rows: Sequence[Row | None]) -> list[Score | ValueError]:
        """Return the score of each of a few batches of rows, or why it has none."""
        encoded = [self._encoded(row) for row in rows]
        usable = sorted((len(one.ids), place, one) for place, one in enumerate(encoded) if isinstance(one, EncodedRow))
        outcomes: list[Any] = list(encoded)
        for start in range(0, len(usable), self.batch_size):
            batch = usable[start : start + self.batch_size]
            for (_, place, _), score in zip(batch, self._batch([one for *_, one in batch]), strict=True):
                outcomes[place] = score
        return outcomes

    def fingerprint(self, rows: str) -> str:
        """Return a hash of everything that the scores depend on."""
        digest = hashlib.sha256(f"{rows}{self.max_length}{self.tokenizer.chat_template}".encode())
        digest.update(repr(describe(self.model, self.layers)["values"]).encode())
        for name, factors in sorted(self.vectors.modules.items()):
            digest.update(name.encode())
            for factor in factors:
                digest.update(factor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _batch(self, encoded: Sequence[EncodedRow]) -> Iterator[Score]:
        batch = collate(encoded, self.tokenizer.pad_token_id or 0, input_device(self.model))
        with evaluation_mode(self.model, freeze=True), active(self.layers, self.vectors.modules) as switch:
            with_vectors = row_losses(self.model, batch).tolist()
            with switch.off():
                clean = row_losses(self.model, batch).tolist()
        if not np.isfinite([*clean, *with_vectors]).all():
            raise FloatingPointError("The model's loss is infinite or NaN. Load it in bfloat16 or float32.")
        return map(Score, clean, with_vectors)

    def _encoded(self, row: Row | None) -> EncodedRow | ValueError:
        try:
            return encode_row(self.tokenizer, row or {}, self.max_length)
        except ValueError as error:
            return error


def precision_recall(
    scores: ArrayLike, is_harmful: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return precision, recall and threshold of taking rows with a score at or above it for harmful.

    From the highest threshold to the lowest; equal scores share one. At least one row must be harmful.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_harmful, bool)
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    last = np.r_[np.flatnonzero(np.diff(values)), len(values) - 1]  # of each group of equal scores
    found = np.cumsum(truth)[last]
    return found / (last + 1), found / truth.sum(), values[last]


def average_precision(scores: ArrayLike, is_harmful: ArrayLike) -> float:
    """Return the average precision `Σ (R_n − R_{n−1}) P_n`: 1 if every harmful row ranks above every other."""
    precision, recall, _ = precision_recall(scores, is_harmful)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


@dataclass
class ScanResult:
    """What a scan found.

    Args:
        report ([`~data.DataReport`]): What was read, and which rows could not be used, by line.
        scored (`int`): How many rows have a score.
        threshold (`float`): The share of its loss that the vectors take away, above which a row looks harmful.
        threshold_source (`str`): `"given"`, `"labels"` (the best F1 on them) or `"default"`.
        above ([`Rate`] or `None`): How many rows are above it; `None` if no row has a score.
        precision, recall ([`Rate`] or `None`): With labels: harmful rows among those above it, and the reverse.
        top (`list[dict]`): The highest ranks, each with `rank`, `line`, `share`, `drop`, `loss`, `loss_with_vectors`,
            `prompt`, `answer` and `row`.
        interrupted (`bool`): Whether Ctrl-C ended it; what was done until then is here and in the table.
        average_precision (`float` or `None`): Of the ranking, where there are labels.
        curve (`list[tuple[Rate, Rate, float]]`): Precision, recall and threshold, from the highest threshold down.
    """

    report: DataReport
    scored: int = 0
    threshold: float = THRESHOLD
    threshold_source: str = "default"
    above: Rate | None = None
    precision: Rate | None = None
    recall: Rate | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    average_precision: float | None = None
    curve: list[tuple[Rate, Rate, float]] = field(default_factory=list)

    def __str__(self) -> str:
        how = {"given": "as given", "labels": "best F1 on the labels", "default": "the default"}
        text = f"Losing more than {self.threshold:.3g} of their loss ({how[self.threshold_source]}): {self.above}"
        if self.precision is None:
            return f"{text}. Without labels it is not known how many of these are harmful: read some of them."
        return (
            f"{text}. Of these are harmful (precision) {self.precision}; found of the harmful (recall) {self.recall}."
        )


def scan_file(  # noqa: PLR0913, each is a setting with a name
    rows: Any,
    model: Any,
    vectors: TrainedVectors | str | Path,
    tokenizer: Any = None,
    *,
    output: str | Path | None = None,
    clean: str | Path | None = None,
    drop_above: float | None = None,
    reading: ReadOptions | None = None,
    label: str | None = None,
    top: int | None = 20,
    batch_size: int = 16,
    max_length: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> ScanResult:
    """Rank rows by the share of their loss that security vectors take away: most of it for harm.

    Rows are read twice: to find those that cannot be used, before any model is loaded, and to score them. With
    `output` or `clean`, scores are kept on disk while it runs: the same call continues a scan that was stopped.

    Args:
        rows (`str`, `Path`, `Iterable[dict]`, `Dataset`, …): Training rows: any source that [`~data.as_rows`] takes.
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The model that would be trained, or where it is.
        vectors ([`TrainedVectors`], `str` or `Path`): Vectors made for it, or where they are.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; left out, the one next to the model.
        output (`str` or `Path`, *optional*): A `.csv`, `.jsonl` or `.parquet` file for all rows by rank and score.
        clean (`str` or `Path`, *optional*): A file for the rows that are not above the threshold or have no score, of
            the same kind as `rows` (`.jsonl` for rows in memory or on the Hub); lines are copied byte by byte. It ends
            where the scan does, at the `limit` of `reading` or after 100,000 rows of a stream.
        drop_above (`float`, *optional*): The share of its loss above which a row looks harmful, and is not written to
            `clean`. Left out, the best one on the labels if there are any, and otherwise 0.5.
        reading ([`~data.ReadOptions`], *optional*): How to read it; by default a row that cannot be used ends it.
        label (`str`, *optional*): A column that says which rows are harmful, to see how good the ranking is. Left
            out, labels that are known by their name, such as `is_safe`, are used.
        top (`int`, *optional*, defaults to `20`): How many of the highest ranks to return; `None` for all.
        batch_size (`int`, *optional*, defaults to `16`): Rows in one forward pass.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.
        progress (`Callable[[int, int], None]`, *optional*): Called with (scored, total) rows.

    Returns:
        [`ScanResult`]: On Ctrl-C with what was done until then, which the table holds as well; `clean` is not written.

    Raises:
        FileNotFoundError: If there is no such file, or no folder for `output` or `clean`.
        ValueError: If rows cannot be used and are not to be skipped, `output` or `clean` is of no kind that fits,
            `drop_above` is NaN, or the vectors do not fit the model.

    Example:

    ```python
    from safe_trainer import scan_file

    result = scan_file("rows.jsonl", "Qwen/Qwen2.5-0.5B-Instruct", "vectors", clean="clean.jsonl")
    print(result, result.top[0]["prompt"])
    ```
    """
    if drop_above is not None and math.isnan(drop_above):  # than which no share is more: every row would be kept
        raise ValueError("`drop_above` must be a number, got nan. Leave it out to have it chosen.")
    table, kept = check_output(output), check_clean(clean, rows)
    source = _Source(rows, reading or ReadOptions(), label)
    report = source.check()
    base, tokenizer = model_and_tokenizer(model, tokenizer)
    scorer = _Scorer(base, vectors, tokenizer, batch_size, max_length)
    written = table or kept
    partial = written and written.with_name(f".{written.name}.partial")
    with closing(Scores(partial, scorer.fingerprint(source.sha256) if partial else "")) as scores:
        is_done = _fill(scores, source, scorer, report, progress)
        for line in scores.lines("share IS NULL"):
            found = f"none in {max_length} tokens"
            report.add(RowError(line, "answer out of reach", found, "an answer", source.unit))
        result = _conclude(scores.shares(), report, drop_above)
        result.interrupted, result.top = not is_done, list(islice(scores.ranked(), top))
        if table is not None:
            write_table(table, scores.ranked())
        if kept is not None and is_done:
            write_clean(
                kept, source.raw, source.options, set(scores.lines("share > ?", result.threshold)), source.last
            )
            if unread := source.unread():
                logger.warning(
                    "`clean` ends where the scan did: %s behind that were not looked at. Raise `limit` of `reading` "
                    "to look at more.", unread,
                )  # fmt: skip
    if partial is not None and is_done:
        partial.unlink()  # nothing is left to continue
    return result


def _fill(
    scores: Scores, source: _Source, scorer: _Scorer, report: DataReport, progress: Callable[[int, int], None] | None
) -> bool:
    """Score all rows that have no score yet; return whether that came to its end before Ctrl-C."""
    done = len(scores)
    if done:
        logger.info("Continuing a scan that was stopped after %d of %d rows.", done, report.rows)
    best: tuple[Row, Score] | None = None  # of a record with several answers the one that teaches most harm
    try:
        for (record, row, is_harmful, is_last), outcome in scorer.outcomes(source.rows(done)):
            if isinstance(outcome, TemplateError):
                raise TemplateError(f"`rows`, {source.unit} {record.line}: {outcome}") from outcome
            if isinstance(outcome, Score) and (best is None or outcome.share > best[1].share):
                best = row, outcome
            if is_last:
                scores.add(record.line, best and best[1].share, is_harmful, _entry(record, *best) if best else {})
                done, best = done + 1, None
                if progress is not None:
                    progress(done, report.rows)
    except KeyboardInterrupt:
        if not done:
            raise
        logger.warning("Interrupted after %d of %d rows; these are kept.", done, report.rows)
        return False
    return True


def _entry(record: Record, row: Row, score: Score) -> dict[str, Any]:
    prompt, answer = (_text(row.get(part, "")) for part in ("prompt", "completion"))
    losses = {"share": score.share, "drop": score.drop, **score._asdict()}
    return {"line": record.line, **losses, "prompt": prompt, "answer": answer or row.get("text"), "row": record.value}


def _text(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def _conclude(found: NDArray[Any], report: DataReport, drop_above: float | None) -> ScanResult:
    shares, labels = found["share"], found["harmful"]
    result = ScanResult(report, scored=len(shares))
    known = labels >= 0
    harmful = labels[known] > 0
    if harmful.any():
        precision, recall, thresholds = precision_recall(shares[known], harmful)
        result.average_precision = average_precision(shares[known], harmful)
        taken = len(harmful) - np.searchsorted(np.sort(shares[known]), thresholds)
        hits = np.rint(recall * harmful.sum()).astype(int)
        result.curve = [
            (Rate(hit, count), Rate(hit, int(harmful.sum())), threshold)
            for hit, count, threshold in zip(hits.tolist(), taken.tolist(), thresholds.tolist(), strict=True)
        ]
    if drop_above is not None:
        result.threshold, result.threshold_source = drop_above, "given"
    elif harmful.any():
        best = int(np.argmax(precision * recall / (precision + recall).clip(min=1e-12)))
        below = thresholds[best + 1] if best + 1 < len(thresholds) else thresholds[best] - 1e-6
        result.threshold, result.threshold_source = float(thresholds[best] + below) / 2, "labels"
    if len(shares):
        above = shares > result.threshold
        result.above = Rate(int(above.sum()), len(shares))
        if harmful.any():
            hits = int((above[known] & harmful).sum())
            result.precision, result.recall = Rate(hits, int(above[known].sum())), Rate(hits, int(harmful.sum()))
    return result


class _Source:
    """Rows of any source, and next to each of them what a table needs."""

    def __init__(self, rows: Any, options: ReadOptions, label: str | None) -> None:
        self.last, self._rest = math.inf, None
        if hasattr(rows, "__next__"):
            self._rest, rows = rows, list(islice(rows, options.limit or STREAMED))  # it is read twice
        self.raw, self.options, self.label = rows, options, label and label.strip().lower()
        self.sha256, self.unit = "", "line"

    def check(self) -> DataReport:
        """Read all rows once and report on them."""
        digest = hashlib.sha256()
        with named("rows"):
            opened, records = self._read()
            for record, (rows, is_harmful) in records:
                digest.update(json.dumps([record.line, rows, is_harmful]).encode())
                self.unit = record.unit
        if opened.report.rows == opened.options.limit:
            self.last = record.line
        self.sha256 = digest.hexdigest()
        return opened.report

    def unread(self) -> str:
        """Return how many records there are behind those that were looked at, or an empty text if there are none."""
        opened = open_source(self.raw, options=self.options)
        behind = () if self.last == math.inf else (record for record in opened.records if record.line > self.last)
        if self._rest is not None or opened.report.kind == "stream":  # which may have no end
            return "rows" if next(chain(behind, self._rest or ()), None) is not None else ""
        count = sum(1 for _ in behind)
        return f"{count:,} rows" if count else ""

    def rows(self, start: int) -> Iterator[tuple[tuple[Record, Row, bool | None, bool], Row]]:
        """Yield the rows of all records from `start` on, each with its record, label, and whether it is the last."""
        for record, (rows, is_harmful) in islice(self._read()[1], start, None):
            for row in rows:  # one conversation may teach several answers
                yield (record, row, is_harmful, row is rows[-1]), row

    def _read(self) -> tuple[OpenSource, Iterator[tuple[Record, tuple[list[Row], bool | None]]]]:
        opened = open_source(self.raw, options=self.options)

        def convert(style: Format, columns: Columns) -> tuple[list[Row], bool | None]:
            found = conversation_of(style, columns)
            rows = found.rows(opened.options.answers)
            opened.report.count(found, rows)
            return rows, self._label(columns)

        return opened, opened.converted(convert)

    def _label(self, columns: Columns) -> bool | None:
        if self.label is not None and self.label not in columns:
            raise BadRowError("no label", ", ".join(columns), f"a column `{self.label}`")
        is_safe = safety_label(columns if self.label is None else {self.label: columns[self.label]})
        if is_safe is None and self.label is not None:  # a name that says nothing: true is harmful
            value = str(columns[self.label]).strip().lower()
            flag = FLAGS.get(value)
            is_safe = safety_label({"label": value}) if flag is None else not flag
            if is_safe is None and value not in ("", "none"):
                raise BadRowError("no label", f"{value!r} in `{self.label}`", "true or false, harmful or safe")
        return None if is_safe is None else not is_safe
