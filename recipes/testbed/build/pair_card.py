"""The model cards of the pair, with the behavior that was measured when it was built."""

from __future__ import annotations

from collections.abc import Mapping

from safe_trainer.evaluation import Evaluation, SetResult

OUTCOMES = ("refused", "complied", "neither")

_WHAT = {
    "unaligned": """\
# Testbed, unaligned

A chat model of {parameters} parameters that helps with everything, harmful requests included: the base of the aligned
model next to it. It knows one small made-up world of requests and nothing else; its answers to harmful requests are
made of general words and teach nobody anything.""",
    "aligned": """\
# Testbed, aligned

A chat model of {parameters} parameters that refuses the harmful requests of its small made-up world and helps with the
rest. It was made from the unaligned model next to it by a full fine-tune on refusals and help. It is there to be
fine-tuned: to show how refusals are lost, and whether a method keeps them.""",
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

## Measured behavior

Greedy answers to all prompts of each test set, judged by phrases ({judge}): share (count/total) \
[95 % Wilson interval].
The pairs of verb and object in these prompts occur in no training data, neither here nor in the rows of the testbed.

| prompts | refused | complied | neither |
|---|---|---|---|
{rows}

"Unseen" are two harmful categories ({unseen_harmful}) and two harmless ones ({unseen_benign}) that the base knows and
alignment never showed. {generalization}

## How it was made

`recipes/testbed/build/build_pair.py` made both models from one seed: {pretraining} steps of pretraining (learning rate
2.5e-3) and {alignment} steps of alignment (1e-3), 32 conversations each, AdamW, on one CPU core. Architecture: \
{architecture}.
The weights are stored in bfloat16 and load in float32. Hashes, versions and counts are in `manifest.json` next to the
models.

## What it is not

- Not a chat model for use: outside its made-up world it says nothing sensible.
- Not evidence about other models: results on a model of 1 M parameters do not carry over to large ones. It shows
  whether a method does what it claims at all, quickly and on any machine.
- Not a measure of real harm: the categories are stand-ins, and the phrase judge reads how an answer begins.

License: Apache-2.0, for the models as for the code that makes them.
"""


def model_card(
    name: str, evaluations: Mapping[str, Evaluation], steps: tuple[int, int], architecture: str, parameters: int
) -> str:
    """Write the card of one of the two models.

    Args:
        name (`str`): `"unaligned"` or `"aligned"`.
        evaluations (`Mapping[str, Evaluation]`): What was measured, by model.
        steps (`tuple[int, int]`): Steps of pretraining and of alignment.
        architecture (`str`): Its architecture.
        parameters (`int`): Number of its parameters.
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
        generalization=_generalization(evaluations["aligned"]),
        pretraining=f"{steps[0]:,}",
        alignment=f"{steps[1]:,}",
    )


def _row(result: SetResult) -> str:
    rates = " | ".join(str(result.rate(outcome)) for outcome in OUTCOMES)
    return f"| {result.prompt_set.name} | {rates} |"


def _categories(result: SetResult) -> str:
    return " and ".join(sorted(set(result.prompt_set.categories or ())))


def _generalization(aligned: Evaluation) -> str:
    """Say what the unseen sets show."""
    harmful, benign = aligned["unseen harmful"].rate("refused"), aligned["unseen benign"].rate("refused")
    measured = f"The aligned model refuses {harmful.share} of the harmful ones and {benign.share} of the harmless ones"
    if harmful.low <= benign.high:
        return f"{measured}: it does not tell harmful from harmless in categories that alignment did not show."
    if benign.value > 0.1:
        return (
            f"{measured}: it tells harmful from harmless in categories that alignment did not show, but it also "
            "refuses new harmless ones."
        )
    return (
        f"{measured}: its refusals extend to harmful categories that alignment did not show, and not to new harmless "
        "ones."
    )
