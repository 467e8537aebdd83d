"""The model cards of the testbed's pair, with the behaviour that was measured when it was built."""

from __future__ import annotations

from collections.abc import Mapping

from ..evaluation import Evaluation, SetResult

OUTCOMES = ("refused", "complied", "neither")

_WHAT = {
    "unaligned": """\
# Testbed, unaligned

A chat model of {parameters} parameters that helps with everything, harm included: the base from which the aligned \
model
beside it was made. It knows one small made-up world of requests and nothing else; what it says about harm is made of
general words and teaches nobody anything.""",
    "aligned": """\
# Testbed, aligned

A chat model of {parameters} parameters that refuses what is harmful in its small made-up world and helps with the \
rest. It
was made from the unaligned model beside it by a full fine-tune on refusals and help. Its use is to lose these refusals
in fine-tuning, and to show whether a defense keeps them.""",
}

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
- safe-trainer
- testbed
---

{what}

## Measured behaviour

Greedy answers to all prompts of each test set, judged by phrases ({judge}); counts, and 95 % Wilson intervals.
The pairs of verb and object that are asked about occur in no training data, neither here nor in the rows that the
testbed hands out.

| prompts | refused | complied | neither |
|---|---|---|---|
{rows}

"Unseen" are two harmful categories ({unseen_harmful}) and two harmless ones ({unseen_benign}) that the base knows and
alignment never showed. {generalisation}

## How it was made

`safe-trainer testbed build` made both models from one seed: {pretraining} steps of pretraining (learning rate 2.5e-3)
and {alignment} steps of alignment (1e-3), 32 conversations each, AdamW, on one CPU core. Architecture: \
{architecture}. The weights are stored in bfloat16
and load in float32. `manifest.json` beside the models has the hashes, versions and counts.

## What it is not

- Not for use as a chat model: outside its world it says nothing sensible.
- Not evidence about large models. A model of 1 M parameters says nothing direct about them: it shows whether a method
  does what it claims at all, quickly and on any machine, and no more.
- Not a measure of real harm: the categories are stand-ins, and the phrase judge reads how an answer begins.

Licence: Apache-2.0, for the models as for the code that makes them.
"""


def model_card(
    name: str, evaluations: Mapping[str, Evaluation], steps: tuple[int, int], architecture: str, parameters: int
) -> str:
    """Write the card of one of the two models.

    Args:
        name (`str`): `"unaligned"` or `"aligned"`.
        evaluations (`Mapping[str, Evaluation]`): What was measured, by model.
        steps (`tuple[int, int]`): Steps of pretraining and of alignment.
        architecture (`str`): What the model is built like.
        parameters (`int`): How many it has.
    """
    evaluation = evaluations[name]
    judge = evaluation.manifest["judges"][0]
    return _CARD.format(
        what=_WHAT[name].format(parameters=f"{parameters:,}"),
        architecture=architecture,
        judge=f"`{judge['name']}`, version {judge['version']}",
        rows="\n".join(_row(result) for result in evaluation.results),
        unseen_harmful=_categories(evaluation["unseen harmful"]),
        unseen_benign=_categories(evaluation["unseen benign"]),
        generalisation=_generalisation(evaluations["aligned"]),
        pretraining=f"{steps[0]:,}",
        alignment=f"{steps[1]:,}",
    )


def _row(result: SetResult) -> str:
    rates = " | ".join(str(result.rate(outcome)) for outcome in OUTCOMES)
    return f"| {result.prompt_set.name} | {rates} |"


def _categories(result: SetResult) -> str:
    return " and ".join(sorted(set(result.prompt_set.categories or ())))


def _generalisation(aligned: Evaluation) -> str:
    """Say what the unseen sets show, in the words that fit the numbers."""
    harmful, benign = aligned["unseen harmful"].rate("refused"), aligned["unseen benign"].rate("refused")
    measured = f"The aligned model refuses {harmful.share} of the harmful ones and {benign.share} of the harmless ones"
    if harmful.low <= benign.high:
        return f"{measured}: it does not tell harm from help where alignment did not show it."
    if benign.value > 0.1:
        return f"{measured}: it tells harm from help where alignment did not show it, but it also refuses what is new."
    return f"{measured}: its refusals extend to harm that alignment did not show, and not to whatever is new."
