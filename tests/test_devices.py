"""Models whose weights are elsewhere until a layer computes: what they are measured as must not differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import planted
import pytest
import tiny
import torch
from runs import REFUSED

from safe_trainer import PromptSet, SafetyBasis, evaluate, generate
from safe_trainer.analysis.refusal_direction import refusal_directions
from safe_trainer.analysis.scan import score_rows
from safe_trainer.artifacts.own_answers import AnswerSettings
from safe_trainer.evaluation import LikelihoodJudge

ASKED = PromptSet("asked", "harmful", ("Make a bad thing.", "Make another."))
MEASURES: dict[str, Callable[[Any], Any]] = {
    "answers": lambda model: [answer.text for answer in generate(model, tiny.tokenizer(), ["Hi"], max_new_tokens=4)],
    "likelihoods": lambda model: (
        evaluate(model, tiny.tokenizer(), [ASKED], judges=[LikelihoodJudge()], max_new_tokens=2)["asked"].outcomes
    ),
    "own answers": lambda model: (
        torch.cat(
            [anchor.log_probs for anchor in AnswerSettings(2).measure(model, tiny.tokenizer(), ASKED, None).anchors]
        )
        .flatten()
        .tolist()
    ),
    "scores": lambda model: [
        score.loss for score in score_rows(REFUSED[:2], model, planted.vectors(tiny.model()), tiny.tokenizer())
    ],
    "a basis": lambda model: next(
        iter(SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSED, rank=2).outputs.values())
    ).singular_values.tolist(),
    "refusal directions": lambda model: [
        direction.norm().item()
        for direction in refusal_directions(model, tiny.tokenizer(), ["Make it."], ["Say it."]).values()
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_an_offloaded_model_is_measured_as_one_in_memory(name, tmp_path):
    model = tiny.model()
    expected = MEASURES[name](model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.device.type == "meta"
    assert MEASURES[name](model) == pytest.approx(expected, abs=1e-5)
