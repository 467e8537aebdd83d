"""Scoring rows: the loss of the clean model, and the loss with security vectors at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...artifacts import TrainedVectors, active, row_losses
from ...artifacts.fitting import frozen
from ...data.encoding import EncodedRow, collate, encode_row
from ...data.rows import Row
from ...lora.updates import LinearLayer

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
