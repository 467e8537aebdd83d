"""A comparison as JSON: everything that is needed to show it again, or to recount it, without the models."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from .comparison import Comparison
from .results import HEADLINES, RATES, SetResult, agreements

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
    content = {"kind": _KIND, "format": FORMAT, **asdict(comparison)}
    content["prompt_sets"] = [result["prompt_set"] for result in content["evaluations"][0]["results"]]
    for result in (result for evaluation in content["evaluations"] for result in evaluation["results"]):
        result["prompt_set"] = result["prompt_set"]["name"]
        for answer in result["answers"]:
            del answer["tokens"]
    content["summary"] = summary(comparison)
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
    from pydantic import TypeAdapter

    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"This is not a complete JSON file: {error}. Was writing it interrupted?") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ValueError('This is JSON, but not a comparison: it does not say `"kind": "safe_trainer comparison"`.')
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
        for evaluation in content["evaluations"]:
            for prompt_set, result in zip(content["prompt_sets"], evaluation["results"], strict=True):
                result["prompt_set"] = prompt_set
        return TypeAdapter(Comparison).validate_python(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The comparison is damaged: {error!r}. Make it again, or copy the file again.") from error


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def summary(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return rates and changes as plain numbers: `{model: {prompt set: {"rates": …, "change": …}}}`."""
    table: dict[str, dict[str, Any]] = {}
    for evaluation in comparison.evaluations:
        table[evaluation.name] = {result.prompt_set.name: _summary(result) for result in evaluation.results}
        for name, entry in table[evaluation.name].items() if evaluation is not comparison.before else ():
            change = comparison.change(evaluation.name, name)
            rates = {"before": change.before.to_dict(), "after": change.after.to_dict()}
            entry["change"] = (
                {"difference": change.difference, **vars(change), **rates} if change.before.total else None
            )
    return table


def _summary(result: SetResult) -> dict[str, Any]:
    kind = result.prompt_set.kind
    entry: dict[str, Any] = {
        "kind": kind,
        "headline": HEADLINES[kind],
        "judge": next(iter(result.verdicts)),
        "rates": {outcome: result.rate(outcome).to_dict() for outcome in RATES[kind]},
        "not_judged": result.not_judged,
    }
    if result.scores:
        entry["scores"] = {judge: mean.to_dict() for judge, mean in result.mean_scores().items()}
    if len(result.verdicts) > 1:
        entry["judges"] = {
            judge: {outcome: result.rate(outcome, judge=judge).to_dict() for outcome in RATES[kind]}
            for judge in result.verdicts
        }
        entry["agreements"] = [agreement.to_dict() for agreement in agreements([result])]
    return entry
