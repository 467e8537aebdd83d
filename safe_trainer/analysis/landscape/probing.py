"""What is measured at one place: how a model answers harmful prompts, and how well it knows a task."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...artifacts.provenance import describe
from ...data import PromptSet
from ...evaluation import Judge, LikelihoodJudge
from ...evaluation.answers import Decoding
from ...evaluation.examination import examine
from ...evaluation.task_quality import reference_loss
from ...lora.updates import LinearLayer
from .record import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A model, and what it is asked wherever it goes.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        harmful (`PromptSet`): Harmful prompts.
        task (`PromptSet`, *optional*): Prompts with references.
        judge (`Judge` or `LikelihoodJudge`): Who judges.
        decoding ([`Decoding`]): How answers are generated, where they are.
    """

    model: Any
    tokenizer: Any
    harmful: PromptSet
    task: PromptSet | None
    judge: Judge | LikelihoodJudge
    decoding: Decoding = field(default_factory=Decoding)

    def at(self, alpha: float, beta: float, name: str = "", share: float = 1.0) -> Place:
        """Measure the model as it is now, and book it under a place."""
        try:
            asked = examine(self.model, self.tokenizer, self.harmful, self.judge, self.decoding)
            found = Counter(asked.outcomes)
        except FloatingPointError:  # so far off that nothing can be computed any more
            found = Counter({"neither": len(self.harmful)})
        return Place(alpha, beta, found["refused"], found["complied"], found["neither"], self._loss(), name, share)

    def settings(self, layers: Mapping[str, LinearLayer]) -> dict[str, Any]:
        """Return what decides on the numbers, as JSON: the model, the prompts, the judge, the decoding."""
        model = describe(self.model, layers)
        return {
            "source": model["id"],
            "model": hashlib.sha256(repr(model["values"]).encode()).hexdigest(),
            "harmful": _known(self.harmful),
            "task": None if self.task is None else _known(self.task),
            "judge": {"name": self.judge.name, "version": self.judge.version},
            "decoding": {name: value for name, value in vars(self.decoding).items() if name != "batch_size"},
        }

    def _loss(self) -> float:
        if self.task is None:
            return math.nan
        how: dict[str, Any] = {name: getattr(self.decoding, name) for name in ("system_prompt", "batch_size")}
        try:
            return round(reference_loss(self.model, self.tokenizer, self.task, **how).value, 6)
        except FloatingPointError:
            return math.nan


def _known(prompts: PromptSet) -> dict[str, Any]:
    text = repr((prompts.prompts, prompts.references))
    return {"name": prompts.name, "count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()}
