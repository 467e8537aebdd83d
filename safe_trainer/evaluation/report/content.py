"""What a report says, as plain values: the HTML and the Markdown template show the same."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from ..gate import BASELINE
from ..judges import PhraseJudge, quality
from ..results import RATES, Comparison, Evaluation, SetResult, agreements
from . import figures

SHOWN_FLIPS = 50  # of each set and model; the JSON beside the report has all

WORDS = {
    "eroded": ("▼", "safety eroded"),
    "kept": ("✓", "safety kept"),
    "improved": ("▲", "safety improved"),
    "unclear": ("?", "not clear"),
    "no_baseline": ("!", "no safety to keep"),
    "unchanged": ("=", "nothing was learned"),
}
DRIFT_FIGURES = {
    "": "‖ΔW‖ / ‖W‖ of each weight that the adapter changes",
    "alignment": "Share of the change that lies along the alignment direction",
    "outputs": "Share of the change that writes where the model writes when it refuses",
    "inputs": "Share of the change that reads where the model reads harmful prompts",
    "refusal": "How much is left of the direction in which harmful prompts differ from harmless ones",
}
WANTED = {
    "harmful": "Harmful prompts: refusing is right.",
    "benign": "Harmless prompts: refusing is wrong.",
    "borderline": "Prompts that only sound harmful: refusing is wrong.",
    "task": "A task: right answers.",
}
_SECTIONS = {
    "verdict": "Verdict", "rates": "Rates", "trade-off": "Trade-off", "numbers": "Numbers",
    "flips": "Changed prompts", "drift": "Layers", "evidence": "Tested and not tested", "manifest": "Manifest",
}  # fmt: skip


class Cell(NamedTuple):
    """A value of a table, and its interval, which is set below it where there is room."""

    share: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.share} {self.interval}".strip()


class Table(NamedTuple):
    """A table: the first entry of the head and of each row names the rows."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, tuple[Cell, ...]]]


def content(comparison: Comparison) -> dict[str, Any]:
    """Return everything that the templates show."""
    manifest = comparison.before.manifest
    drifts = [
        {"words": DRIFT_FIGURES.get(name, name), "tables": tables}
        for name, tables in figures.heats(comparison.evaluations).items()
    ]
    flips, plane = _flips(comparison), figures.plane(comparison.evaluations)
    optional = {"trade-off": plane, "flips": flips, "drift": drifts}
    date = f"{datetime.fromisoformat(manifest['date']):%Y-%m-%d %H:%M} UTC" if "date" in manifest else "undated"
    return {
        "title": manifest.get("model", {}).get("id", "Unknown model"),
        "subtitle": f"{len(comparison.evaluations)} models compared · {date}",
        "contents": [(key, label) for key, label in _SECTIONS.items() if optional.get(key, True)],
        "before": comparison.before.name,
        "verdicts": [_verdict(comparison, evaluation) for evaluation in comparison.evaluations[1:]],
        "notes": comparison.all_notes(),
        "groups": _groups(comparison),
        "missing": {kind: WANTED[kind] for kind in RATES if not comparison.before.of_kind(kind)},
        "plane": plane,
        "tables": tables_of(comparison),
        "flips": flips,
        "drifts": drifts,
        "evidence": evidence(comparison),
        "manifest": [{"name": e.name, "entries": _flat(e.manifest)} for e in comparison.evaluations],
        "method": _method(comparison),
        "version": manifest.get("packages", {}).get("safe-trainer", ""),
    }


def _verdict(comparison: Comparison, evaluation: Evaluation) -> dict[str, Any]:
    """Return a verdict, never without over-refusals, help and tasks next to the refusals."""
    verdict = comparison.verdict(evaluation.name)
    sign, word = WORDS[verdict.level]
    asked = {
        "Refusal rate (harmful prompts)": (("harmful",), "refused"),
        "Compliance rate (harmful prompts)": (("harmful",), "complied"),
        "Over-refusal rate (harmless prompts)": (("benign", "borderline"), "refused"),
        "Answered (harmless prompts)": (("benign", "borderline"), "complied"),
        "Task accuracy": (("task",), "correct"),
    }
    facts = []
    for name, (kinds, outcome) in asked.items():
        old, new = (e.pooled(outcome, *kinds) for e in (comparison.before, evaluation))
        measured = old.total and new.total
        facts.append({"name": name, "value": f"{old.share} → {new.share}" if measured else "not measured"})
    return {
        "name": evaluation.name, "level": verdict.level, "sign": sign, "word": word, "headline": verdict.headline,
        "details": verdict.details, "facts": facts, "sentences": comparison.sentences(evaluation.name),
    }  # fmt: skip


def _groups(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one group of bars for each prompt set, with a bar for each model."""
    return [
        {
            "title": result.prompt_set.name,
            "wanted": WANTED[result.prompt_set.kind],
            "rows": [figures.bar(e.name, e[result.prompt_set.name]) for e in comparison.evaluations],
        }
        for result in _by_kind(comparison)
    ]


def tables_of(comparison: Comparison) -> list[Table]:
    """Return all rates; then by category, over training runs and by judge, where there are several."""
    evaluations, names = comparison.evaluations, tuple(e.name for e in comparison.evaluations)
    rows = []
    for result in _by_kind(comparison):
        name = result.prompt_set.name
        rows += [(label, _cells(e[name].rate(outcome) for e in evaluations)) for label, outcome in _labels(result)]
    not_measured = (Cell("not measured"),) * len(names)
    rows += [(kind, not_measured) for kind in RATES if not comparison.before.of_kind(kind)]
    tables = [Table("Rate (count/total) [95 % interval]", names, rows)]
    for result in comparison.before.of_kind("harmful"):
        name = result.prompt_set.name
        rows = [
            (label, _cells(e[name].rate("refused", category=label) for e in evaluations))
            for label in result.by_category("refused")
        ]
        tables.append(Table(f"{name}: refusal rate by category", names, rows))
    return [table for table in (*tables, _runs(comparison), _judges(comparison)) if table.rows]


def _runs(comparison: Comparison) -> Table:
    groups = {name: runs for name, runs in comparison.runs.items() if len(runs) > 1}
    rows = []
    for result in _by_kind(comparison) if groups else ():
        name = result.prompt_set.name
        for label, outcome in _labels(result):
            cells = [Cell(result.rate(outcome).share)]
            for group, runs in groups.items():
                measured = all(comparison[run][name].rate(outcome).total for run in runs)
                cells.append(Cell(str(comparison.spread(group, name, outcome)) if measured else "not measured"))
            rows.append((label, tuple(cells)))
    caption = "Mean over training runs that differ in their seed [95 % interval of the mean]"
    return Table(caption, (comparison.before.name, *groups), rows)


def _judges(comparison: Comparison) -> Table:
    rows = []
    for result in _by_kind(comparison):
        for label, outcome in _labels(result) if len(result.verdicts) > 1 else ():
            for judge in result.verdicts if outcome != "neither" else ():
                rates = (e[result.prompt_set.name].rate(outcome, judge=judge) for e in comparison.evaluations)
                rows.append((f"{label} ({judge})", _cells(rates)))
    return Table("Each judge by itself", tuple(e.name for e in comparison.evaluations), rows)


def _by_kind(comparison: Comparison) -> list[SetResult]:
    return [result for kind in RATES for result in comparison.before.of_kind(kind)]


def _labels(result: SetResult) -> list[tuple[str, str]]:
    names = RATES[result.prompt_set.kind]
    return [(f"{result.prompt_set.name}: {name}", outcome) for outcome, name in names.items()]


def _cells(rates: Any) -> tuple[Cell, ...]:
    return tuple(Cell(rate.share, rate.interval_text) for rate in rates)


def _flips(comparison: Comparison) -> list[dict[str, Any]]:
    sets = []
    for evaluation in comparison.evaluations[1:]:
        for result in _by_kind(comparison):
            found = comparison.flips(evaluation.name, result.prompt_set.name)
            courses = Counter(f"{flip.outcome_before} → {flip.outcome_after}" for flip in found)
            summary = ", ".join(f"{count} × {course}" for course, count in courses.most_common())
            if len(found) > SHOWN_FLIPS:
                summary += f"; the first {SHOWN_FLIPS} are shown, the JSON report has all"
            shown = [
                {
                    "course": " · ".join(
                        filter(None, (f"{flip.outcome_before} → {flip.outcome_after}", flip.category))
                    ),
                    "prompt": flip.prompt,
                    "before": flip.before.text or "(nothing)",
                    "after": flip.after.text or "(nothing)",
                }
                for flip in found[:SHOWN_FLIPS]
            ]
            title = f"{evaluation.name}, {result.prompt_set.name}"
            harmful = result.prompt_set.kind == "harmful"
            if found:
                sets.append({"title": title, "name": evaluation.name, "summary": summary, "shown": shown,
                             "harmful": harmful})  # fmt: skip
    return sets


def evidence(comparison: Comparison) -> dict[str, Any]:
    """Return what was tested, by which judges, what was not, what the numbers cannot carry, and the command."""
    return {
        "tested": _tested(comparison),
        "judges": [_judge(judge) for judge in comparison.before.manifest.get("judges", ())]
        + [f"{e.name}: {agreement}." for e in comparison.evaluations for agreement in agreements(e)],
        "untested": _untested(comparison),
        "limits": _limits(comparison),
        "command": reproduction(comparison),
    }


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
        framed = " in a frame of their own" if asked.template or asked.system_prompt or asked.contexts else ""
        scored = f", scored by {asked.scorer}" if asked.kind == "task" else ""
        lines.append(f"{asked.name}: {len(asked)} prompts{categories}{framed} that {kinds[asked.kind]}{scored}.")
    decoding = comparison.before.manifest.get("decoding")
    if decoding:
        how = "greedily" if decoding["temperature"] == 0 else f"by sampling at temperature {decoding['temperature']}"
        system = "with a system prompt" if decoding["system_prompt"] else "without a system prompt of ours"
        lines.append(f"Each prompt was asked once, {system}, and answered {how} in at most "
                     f"{decoding['max_new_tokens']} tokens.")  # fmt: skip
    return lines


def _judge(judge: dict[str, str]) -> str:
    known = PhraseJudge()
    name = f"{judge['name']} {judge['version']}"
    if (judge["name"], judge["version"]) != (known.name, known.version):
        return f"{name}: its error rate has not been measured here."
    found = quality(known)
    refused, complied = found["refused"], found["complied"]
    return (
        f"{name}: on labelled answers that were held out, and hard on purpose, it finds {refused.recall.share} of the "
        f"refusals and {complied.recall.share} of the compliances; of what it calls a refusal, "
        f"{refused.precision.share} is one, of what it calls compliance {complied.precision.share}. An answer in a "
        "language that it does not know has no verdict."
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
        "Tools, images, and languages other than those of the prompts.",
        "Whether an answer that takes up a harmful request is correct or of use to anyone.",
        "Bias, privacy, factual errors, and how the model behaves after further fine-tuning.",
    ]


def _limits(comparison: Comparison) -> list[str]:
    answers = [answer for e in comparison.evaluations for result in e.results for answer in result.answers]
    runs = (
        "the table over training runs has intervals that do."
        if any(len(names) > 1 for names in comparison.runs.values())
        else "for that, train with several seeds."
    )
    return [
        "The intervals say what other prompts of the same kind and making would show. They say nothing about prompts "
        f"of another kind, and nothing about another training run: {runs}",
        f"Each model was tested on {len(comparison.before.results)} sets, each at 5 %: where nothing changed at all, "
        "about one set in twenty still looks as if it had.",
        "A judge that errs in the same way before and after distorts the rates more than the difference.",
        f"Where the model before refuses less than {BASELINE:.0%} of the harmful prompts, no verdict says that safety "
        "was kept.",
        f"{sum(answer.truncated for answer in answers)} of {len(answers)} answers were cut off at the longest length; "
        "how they would have ended was not judged.",
        "A refusal rate shows what a model says, not what it can be made to say.",
    ]


def reproduction(comparison: Comparison) -> str:
    """Return the command line that repeats a comparison of adapters, with names where the paths were private."""
    manifest: dict[str, Any] = dict(comparison.before.manifest)
    groups = {run: name for name, runs in comparison.runs.items() for run in runs}
    words = ["safe-trainer", "compare", manifest.get("model", {}).get("id", "MODEL")]
    for evaluation in comparison.evaluations[1:]:
        name, adapters = groups.get(evaluation.name, evaluation.name), evaluation.manifest.get("adapters", ["ADAPTER"])
        if adapters:
            source = adapters[0]["id"] if isinstance(adapters[0], dict) else adapters[0]
            words += ["--adapter", f"{name}={source}"]
        else:
            words += ["--tuned-model", f"{name}={evaluation.manifest.get('model', {}).get('id', 'MODEL')}"]
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


def _method(comparison: Comparison) -> str:
    manifest = comparison.before.manifest
    if not manifest:
        return ""
    decoding, judges = manifest["decoding"], manifest["judges"]
    greedy = "greedy" if decoding["temperature"] == 0 else f"sampled at temperature {decoding['temperature']}"
    system = "a system prompt" if decoding["system_prompt"] else "no system prompt of ours"
    judged = ", ".join(f"{judge['name']} {judge['version']}" for judge in judges)
    agreed = "".join(f" {e.name}: {found}." for e in comparison.evaluations for found in agreements(e))
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    return (
        f"Base model {manifest['model']['id']}; {greedy} decoding, at most {decoding['max_new_tokens']} tokens, "
        f"{system}; judged by {judged}.{agreed} Intervals: Wilson, 95 %; differences: paired bootstrap (seed "
        f"{comparison.seed}), p from the exact McNemar test. The compliance rate counts answers that took up a "
        f"harmful request, right or not; neither is an empty or meaningless answer. {packages}."
    )


def _flat(manifest: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Lay a manifest out as pairs of name and value."""
    entries: list[tuple[str, str]] = []
    for key, value in manifest.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            entries += _flat(value, f"{name}: ")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value, start=1):
                entries += _flat(item, f"{name} {number}: ")
        else:
            entries.append((name, "none" if value in (None, [], "") else str(value)))
    return entries
