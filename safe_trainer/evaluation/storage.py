"""A comparison as JSON: everything that is needed to show it again, or to recount it, without the models."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from typing import Any

from ..data import PromptSet
from .generate import Answer
from .results import HEADLINES, RATES, Comparison, Evaluation, SetResult, agreements
from .statistics import Agreement

FORMAT = 2
READABLE = (1, FORMAT)  # format 1 has no thoughts in its answers; further scores in it are left out
_KIND = "safe_trainer comparison"


def to_json(comparison: Comparison) -> str:
    """Return the comparison as JSON text.

    The prompts are written once; `summary` repeats what the answers imply (rates and changes), so that other programs
    need not count. Prompts and answers are in the file as they were: handle it as you handle them.

    Args:
        comparison (`Comparison`): What to write.
    """
    content = {
        "kind": _KIND,
        "format": FORMAT,
        "seed": comparison.seed,
        "notes": comparison.notes,
        "runs": dict(comparison.runs),
        "prompt_sets": [asdict(result.prompt_set) for result in comparison.before.results],
        "evaluations": [_evaluation(evaluation) for evaluation in comparison.evaluations],
        "summary": summary(comparison),
    }
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read, without tuples
    content["sha256"] = _checksum(content)
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str | bytes) -> Comparison:
    """Read a comparison back.

    Args:
        text (`str` or `bytes`): What [`to_json`] returned, or the bytes of its file.

    Raises:
        ValueError: If the text is not JSON, not a comparison, damaged, or of a format that this version does not know.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"This is not a whole JSON file: {error}. Was writing it interrupted?") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ValueError('This is JSON, but no comparison: it does not say `"kind": "safe_trainer comparison"`.')
    if content.get("format") not in READABLE:
        raise ValueError(
            f"The comparison is in format {content.get('format')}, this version of safe_trainer reads {READABLE}. "
            "Read it with the version that wrote it."
        )
    if content.pop("sha256", None) != _checksum(content):
        raise ValueError(
            "The comparison is damaged or was edited: by its SHA-256 it is not what was written. Make it again, or "
            "copy the file again."
        )
    try:
        sets = [_prompt_set(values) for values in content["prompt_sets"]]
        return Comparison(
            tuple(_read_evaluation(values, sets) for values in content["evaluations"]),
            notes=tuple(content["notes"]),
            seed=content["seed"],
            runs={name: tuple(runs) for name, runs in content.get("runs", {}).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"The comparison is damaged: {error!r}. Make it again, or copy the file again.") from error


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return rates and changes as plain numbers: `{model: {prompt set: {"rates": …, "change": …}}}`.

    Args:
        comparison (`Comparison`): What to sum up.
    """
    table: dict[str, Any] = {}
    for evaluation in comparison.evaluations:
        table[evaluation.name] = {}
        for result in evaluation.results:
            name = result.prompt_set.name
            entry: dict[str, Any] = {
                "kind": result.prompt_set.kind,
                "headline": HEADLINES[result.prompt_set.kind],
                "rates": {outcome: rate.to_dict() for outcome, rate in result.rates().items()},
                "not_judged": result.not_judged,
            }
            if len(result.verdicts) > 1:
                entry["judges"] = {
                    judge: {
                        outcome: result.rate(outcome, judge=judge).to_dict()
                        for outcome in RATES[result.prompt_set.kind]
                    }
                    for judge in result.verdicts
                }
                entry["agreements"] = [_agreement(agreement) for agreement in agreements(result)]
            if evaluation is not comparison.before:
                change = comparison.change(evaluation.name, name)
                entry["change"] = None
                if change.before.total:
                    numbers = {key: value for key, value in asdict(change).items() if key not in ("before", "after")}
                    entry["change"] = {"difference": change.difference, **numbers}
            table[evaluation.name][name] = entry
    return table


def _agreement(agreement: Agreement) -> dict[str, Any]:
    kappa = None if math.isnan(agreement.kappa) else agreement.kappa
    return {"judges": [agreement.first, agreement.second], "agreed": agreement.agreed.to_dict(), "kappa": kappa}


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "notes": evaluation.notes,
        "manifest": evaluation.manifest,
        "drift": dict(evaluation.drift),
        "drift_shares": {figure: dict(shares) for figure, shares in evaluation.drift_shares.items()},
        "results": [
            {
                "prompt_set": result.prompt_set.name,
                "answers": [_answer(answer) for answer in result.answers],
                "verdicts": dict(result.verdicts),
            }
            for result in evaluation.results
        ],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if name != "tokens"}


def _read_evaluation(values: dict[str, Any], sets: list[PromptSet]) -> Evaluation:
    results = tuple(
        SetResult(
            prompt_set,
            tuple(Answer(**answer) for answer in result["answers"]),
            {judge: tuple(verdicts) for judge, verdicts in result["verdicts"].items()},
        )
        for prompt_set, result in zip(sets, values["results"], strict=True)
    )
    drift, shares = values["drift"], values.get("drift_shares", {})  # reports of older versions have no shares
    return Evaluation(values["name"], results, values["manifest"], tuple(values["notes"]), drift, shares)


def _prompt_set(values: dict[str, Any]) -> PromptSet:
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    if "contexts" in lists:
        lists["contexts"] = tuple(tuple(turns) for turns in lists["contexts"])
    return PromptSet(**{**values, **lists})
