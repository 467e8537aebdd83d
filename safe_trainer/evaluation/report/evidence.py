"""What a report owes to whoever relies on it: what was tested, by whom, what was not, and how to do it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from ..judges import PhraseJudge, quality
from ..results import Comparison, Evaluation


@dataclass(frozen=True)
class Evidence:
    """The report's account of itself, in sentences.

    Args:
        tested (`tuple[str, ...]`): What was tested, on what.
        judges (`tuple[str, ...]`): Who judged, and how often they are known to err.
        untested (`tuple[str, ...]`): What was not tested.
        limits (`tuple[str, ...]`): What the numbers cannot carry.
        command (`str`): What to run to do it again.
    """

    tested: tuple[str, ...]
    judges: tuple[str, ...]
    untested: tuple[str, ...]
    limits: tuple[str, ...]
    command: str


def evidence(comparison: Comparison) -> Evidence:
    """Return the account of a comparison.

    Args:
        comparison (`Comparison`): The comparison; what its manifest does not say is said to be unknown.
    """
    manifest = comparison.before.manifest
    return Evidence(
        tested=tuple(_tested(comparison)),
        judges=tuple(_judge(judge) for judge in manifest.get("judges", ())),
        untested=tuple(_untested(comparison)),
        limits=_limits(comparison),
        command=reproduction(comparison),
    )


def reproduction(comparison: Comparison) -> str:
    """Return the command line that repeats a comparison of adapters, with names where the paths were private.

    Args:
        comparison (`Comparison`): The comparison.
    """
    manifest: dict[str, Any] = dict(comparison.before.manifest)
    groups = {run: name for name, runs in comparison.runs.items() for run in runs}
    words = ["safe-trainer", "compare", manifest.get("model", {}).get("id", "MODEL")]
    for evaluation in comparison.evaluations[1:]:
        words += _source_of(evaluation, groups.get(evaluation.name, evaluation.name))
    for result in comparison.before.results:
        words += ["--prompts", f"{result.prompt_set.kind}={result.prompt_set.source or result.prompt_set.name}"]
    for judge in manifest.get("judges", ()):
        if judge["name"] != "phrases" or len(manifest["judges"]) > 1:
            words += ["--judge", ":".join(filter(None, (judge["name"], judge.get("model"))))]
    decoding = manifest.get("decoding", {})
    if decoding.get("system_prompt"):
        words += ["--system-prompt", decoding["system_prompt"]]
    words += ["--max-new-tokens", str(decoding.get("max_new_tokens", "N"))]
    return shlex.join(words)


def _source_of(evaluation: Evaluation, name: str) -> list[str]:
    adapters = evaluation.manifest.get("adapters", [{"id": "ADAPTER"}])
    if not adapters:
        return ["--tuned-model", f"{name}={evaluation.manifest.get('model', {}).get('id', 'MODEL')}"]
    source = adapters[0]["id"] if isinstance(adapters[0], dict) else adapters[0]
    return ["--adapter", f"{name}={source}"]


def _tested(comparison: Comparison) -> list[str]:
    models = ", ".join(evaluation.name for evaluation in comparison.evaluations)
    lines = [f"{len(comparison.evaluations)} models or adapters: {models}."]
    kinds = {
        "harmful": "should be refused",
        "benign": "should be answered",
        "borderline": "only sound harmful and should be answered",
        "task": "have a right answer",
    }
    for result in comparison.before.results:
        asked = result.prompt_set
        categories = f" in {len(set(asked.categories))} categories" if asked.categories else ""
        lines.append(f"{asked.name}: {len(asked)} prompts{categories} that {kinds[asked.kind]}.")
    decoding = comparison.before.manifest.get("decoding")
    if decoding:
        how = "greedily" if decoding["temperature"] == 0 else f"by sampling at temperature {decoding['temperature']}"
        system = "behind a system prompt" if decoding["system_prompt"] else "without a system prompt of ours"
        lines.append(f"Each prompt was asked once, {system}, and answered {how} in at most "
                     f"{decoding['max_new_tokens']} tokens.")  # fmt: skip
    return lines


def _judge(judge: dict[str, str]) -> str:
    known = PhraseJudge()
    name = f"{judge['name']} {judge['version']}"
    if (judge["name"], judge["version"]) != (known.name, known.version):
        return f"{name}: how often it errs has not been measured here."
    refused, complied = quality(known)["refused"], quality(known)["complied"]
    return (
        f"{name}: on labelled answers that were held out, and hard on purpose, it finds {refused.recall.share} of the "
        f"refusals and {complied.recall.share} of the compliances; of what it calls a refusal, "
        f"{refused.precision.share} is one, of what it calls compliance {complied.precision.share}."
    )


def _untested(comparison: Comparison) -> list[str]:
    kinds = {
        "harmful": "Refusals of harmful prompts",
        "benign": "Help with ordinary prompts",
        "borderline": "Prompts that only sound harmful",
        "task": "The quality of any task",
    }
    lines = [
        f"{what}: no such prompts were asked." for kind, what in kinds.items() if not comparison.before.of_kind(kind)
    ]
    return [
        *lines,
        "Jailbreaks: prompts that are built to get round refusals (role play, encodings, suffixes, long contexts).",
        "Conversations of more than one turn, tools, images, and languages other than those of the prompts.",
        "Whether an answer that takes up a harmful request is correct or of use to anyone.",
        "Bias, privacy, factual errors, and how the model behaves after further fine-tuning.",
    ]


def _limits(comparison: Comparison) -> tuple[str, ...]:
    cut = sum(answer.truncated for e in comparison.evaluations for r in e.results for answer in r.answers)
    total = sum(len(result.answers) for e in comparison.evaluations for result in e.results)
    sets = len(comparison.before.results)
    runs = (
        "the table over training runs has intervals that do."
        if any(len(names) > 1 for names in comparison.runs.values())
        else "for that, train with several seeds."
    )
    return (
        "The intervals say what other prompts of the same kind and making would show. They say nothing about prompts "
        f"of another kind, and nothing about another training run: {runs}",
        f"Each model was tested on {sets} sets, each at 5 %: where nothing changed at all, about one set in twenty "
        "still looks as if it had.",
        "A judge that errs in the same way before and after distorts the rates more than the difference.",
        f"{cut} of {total} answers were cut off at the longest length; how they would have ended was not judged.",
        "A refusal rate shows what a model says, not what it can be made to say.",
    )
