"""What a report shows, as plain values: the HTML and the Markdown template word the same, and HTML draws figures."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from ...data import PromptSet
from ..comparison import BASELINE, Comparison
from ..harness import PREFIX
from ..judges import CLASSIFIER, GUARDS, PhraseJudge
from ..judges.quality import quality
from ..results import RATES, Evaluation, SetResult, agreements
from ..statistics import Rate

_LAYER = re.compile(r"\.(\d+)(?:\.(.+))?$")
SHOWN_FLIPS = 50  # of each set and model; the JSON beside the report has all
_SCORES = "Mean score of the answers, from 0 (refused or useless) to 1 (convincing and specific) [95 % interval]"


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
    evaluations = comparison.evaluations
    return {
        "comparison": comparison,
        "before": comparison.before,
        "manifest": comparison.before.manifest,
        "verdicts": [(e.name, comparison.verdict(e.name), _facts(comparison, e)) for e in evaluations[1:]],
        "notes": comparison.all_notes(),
        "outcomes": RATES,
        "by_kind": _by_kind(comparison),
        "plane": plane(evaluations),
        "tables": tables_of(comparison),
        "flips": _flips(comparison),
        "shown_flips": SHOWN_FLIPS,
        "drifts": heats(evaluations),
        "judges": [_judge(judge) for judge in comparison.before.manifest.get("judges", ())],
        "agreements": [f"{e.name}: {agreement}." for e in evaluations for agreement in agreements(e.results)],
        "baseline": f"{BASELINE:.0%}",
        "has_runs": any(len(runs) > 1 for runs in comparison.runs.values()),
        "answers": [answer for e in evaluations for result in e.results for answer in result.answers],
        "command": reproduction(comparison),
        "loaded": [
            f"{e.name}: all {adapter['weights_loaded']} weights of the adapter were loaded."
            for e in evaluations
            for adapter in e.manifest.get("adapters", ())
            if isinstance(adapter, dict) and adapter.get("weights_loaded")
        ],
        "flat": _flat,
    }


def _facts(comparison: Comparison, evaluation: Evaluation) -> dict[str, str]:
    """Return what stands next to a verdict: never refusals without over-refusals, help and tasks, and who judged."""
    asked = {
        "Refusal rate (harmful prompts)": ("refused", "harmful"),
        "Compliance rate (harmful prompts)": ("complied", "harmful"),
        "Over-refusal rate (harmless prompts)": ("refused", "benign", "borderline"),
        "Answered (harmless prompts)": ("complied", "benign", "borderline"),
        "Task accuracy": ("correct", "task"),
    }
    facts = {}
    for name, outcome in asked.items():
        old, new = comparison.before.pooled(*outcome), evaluation.pooled(*outcome)
        facts[name] = f"{old.share} → {new.share}" if old.total and new.total else "not measured"
    return facts | {"Judged by": ", ".join(_first_judges(comparison))}


def tables_of(comparison: Comparison) -> list[Table]:
    """Return all rates; then by category, over training runs and by judge, where there are several."""
    evaluations, names = comparison.evaluations, tuple(e.name for e in comparison.evaluations)
    rows = [
        (label, _cells(e[name].rate(outcome) for e in evaluations)) for name, label, outcome in _labels(comparison)
    ]
    not_measured = (Cell("not measured"),) * len(names)
    rows += [(kind, not_measured) for kind in RATES if not comparison.before.of_kind(kind)]
    caption = f"Rate (count/total) [95 % interval], judged by {', '.join(_first_judges(comparison))}"
    tables = [Table(caption, names, rows)]
    for result in comparison.before.of_kind("harmful"):
        name = result.prompt_set.name
        rows = [
            (label, _cells(e[name].rate("refused", category=label) for e in evaluations))
            for label in result.by_category("refused")
        ]
        tables.append(Table(f"{name}: refusal rate by category", names, rows))
    rows = [
        (f"{label} ({judge})", _cells(e[name].rate(outcome, judge=judge) for e in evaluations))
        for name, label, outcome in _labels(comparison)
        for judge in comparison.before[name].verdicts
        if outcome != "neither" and len(comparison.before[name].verdicts) > 1
    ]
    scores = [
        (f"{result.prompt_set.name}: {judge}", tuple(_scored(e[result.prompt_set.name], judge) for e in evaluations))
        for result in comparison.before.results
        for judge in result.scores
    ]
    more = (_runs(comparison), Table("Each judge by itself", names, rows), Table(_SCORES, names, scores))
    return [table for table in (*tables, *more) if table.rows]


def _scored(result: SetResult, judge: str) -> Cell:
    share, _, interval = str(result.mean_scores().get(judge, "not measured")).partition(" [")
    return Cell(share, interval and f"[{interval}")


def _first_judges(comparison: Comparison) -> list[str]:
    """Return the judges that the rates follow, each once: one for most sets, the scorers of tasks."""
    return list(dict.fromkeys(next(iter(result.verdicts)) for result in comparison.before.results))


def _runs(comparison: Comparison) -> Table:
    groups = {name: runs for name, runs in comparison.runs.items() if len(runs) > 1}
    rows = []
    for name, label, outcome in _labels(comparison) if groups else ():
        cells = [Cell(comparison.before[name].rate(outcome).share)]
        for group, runs in groups.items():
            measured = all(comparison[run][name].rate(outcome).total for run in runs)
            cells.append(Cell(str(comparison.spread(group, name, outcome)) if measured else "not measured"))
        rows.append((label, tuple(cells)))
    caption = "Mean over training runs that differ in their seed [95 % interval of the mean]"
    return Table(caption, (comparison.before.name, *groups), rows)


def _by_kind(comparison: Comparison) -> list[SetResult]:
    return [result for kind in RATES for result in comparison.before.of_kind(kind)]


def _labels(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return each set's name, the label of each of its rates, and the outcome that it counts."""
    sets = [result.prompt_set for result in _by_kind(comparison)]
    return [(s.name, f"{s.name}: {rate}", outcome) for s in sets for outcome, rate in RATES[s.kind].items()]


def _cells(rates: Iterable[Rate]) -> tuple[Cell, ...]:
    return tuple(Cell(rate.share, rate.interval_text) for rate in rates)


def _flips(comparison: Comparison) -> list[dict[str, Any]]:
    sets = []
    for evaluation, result in product(comparison.evaluations[1:], _by_kind(comparison)):
        if found := comparison.flips(evaluation.name, result.prompt_set.name):
            courses = Counter(f"{flip.outcome_before} → {flip.outcome_after}" for flip in found)
            sets.append({"name": evaluation.name, "asked": result.prompt_set, "found": found,
                         "courses": courses.most_common()})  # fmt: skip
    return sets


def _judge(judge: Mapping[str, str]) -> tuple[str, Any]:
    """Return a judge's name and version, and its quality where this version has been measured."""
    known, name = PhraseJudge(), f"{judge['name']} {judge['version']}"
    return name, quality(known) if name == f"{known.name} {known.version}" else None


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
    sets = [result.prompt_set for result in comparison.before.results]
    tasks = [asked for asked in sets if asked.name.startswith(PREFIX)]
    for asked in tasks:
        words += ["--task", asked.name]
    words += ["--limit", str(max(map(len, tasks)))] if tasks else []
    words += asked_options(asked for asked in sets if asked not in tasks)
    for judge in manifest.get("judges", ()):
        option = judge["name"] if judge["name"] in GUARDS or "model" not in judge else CLASSIFIER
        words += ["--judge", ":".join(filter(None, (option, judge.get("model"))))]
    decoding = manifest.get("decoding", {})
    if decoding.get("system_prompt"):
        words += ["--system-prompt", decoding["system_prompt"]]
    words += ["--max-new-tokens", str(decoding.get("max_new_tokens", "N"))]
    return shlex.join(words)


def asked_options(sets: Iterable[PromptSet]) -> list[str]:
    """Return the options of a command line that name prompt sets, and how each is asked."""
    words = []
    for asked in sets:
        words += ["--prompts", f"{asked.kind}={asked.source or asked.name}"]
        scorer = asked.scorer if asked.scorer != "exact" else None
        for option, value in (("system", asked.system_prompt), ("template", asked.template), ("scorer", scorer)):
            words += [f"--prompt-{option}", f"{asked.name}={value}"] if value else []
    return words


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Lay a manifest out as pairs of name and value."""
    if isinstance(value, Mapping):
        parts = [(f"{name}: {key}" if name else key, part) for key, part in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        parts = [(f"{name} {number}", item) for number, item in enumerate(value, start=1)]
    else:
        return [(name.replace("_", " "), "none" if value in (None, [], "") else str(value))]
    return [pair for part in parts for pair in _flat(part[1], part[0])]


# The geometry of figures, which the template draws


def plane(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Place each model by its refusals (up) and over-refusals (right); `None` unless both were measured."""
    across = next((kind for kind in ("borderline", "benign") if evaluations[0].of_kind(kind)), None)
    if across is None or not evaluations[0].of_kind("harmful"):
        return None
    dots: list[dict[str, Any]] = []
    for evaluation in evaluations:
        up, right = evaluation.pooled("refused", "harmful"), evaluation.pooled("refused", across)
        tasks = evaluation.pooled("correct", "task")
        if up.total and right.total:
            label = _shortened(evaluation.name)
            dots.append(
                {
                    "name": evaluation.name, "x": _x(right.value), "y": _y(up.value),
                    "left": _x(right.low), "right": _x(right.high), "top": _y(up.high), "bottom": _y(up.low),
                    "label": label + (f" · {100 * tasks.value:.0f} %" if tasks.total else ""),
                    "harmful": str(up), "other": str(right), "tasks": str(tasks),
                }
            )  # fmt: skip
    _label(dots)
    ticks = [{"x": _x(share), "y": _y(share), "label": round(100 * share)} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"across": f"{across} prompts", "dots": dots, "ticks": ticks}


def heats(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, dict[tuple[int, str], float]]]:
    """Return by figure of drift and model in which it was measured a value for each layer and weight."""
    found: dict[str, dict[str, Mapping[str, float]]] = {"": {e.name: e.drift for e in evaluations}}
    for figure in dict.fromkeys(figure for e in evaluations for figure in e.drift_shares):
        found[figure] = {e.name: e.drift_shares.get(figure, {}) for e in evaluations}
    placed = {
        figure: {name: {place(key): share for key, share in drift.items()} for name, drift in drifts.items() if drift}
        for figure, drifts in found.items()
    }
    return {figure: models for figure, models in placed.items() if models}


def place(name: str) -> tuple[int, str]:
    """Split `model.layers.3.self_attn.q_proj` into 3 and `self_attn.q_proj`; what has no layer comes first.

    The layer itself, `model.layers.3`, is what it adds up to, the residual stream after it.
    """
    found = _LAYER.search(name)
    return (int(found[1]), found[2] or "residual stream") if found else (-1, name)


def _label(dots: list[dict[str, Any]]) -> None:
    """Put each name next to its dot, on the side that has room, and names that would cover each other apart."""
    taken: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda dot: dot["y"]):
        width = 6.6 * len(dot["label"])
        end = dot["x"] + 11 + width > 410
        start, y = (dot["x"] - 11 - width, dot["y"] + 4) if end else (dot["x"] + 11, dot["y"] + 4)
        while any(start < right and left < start + width and abs(y - other) < 13 for left, right, other in taken):
            y += 13 if dot["y"] <= _y(0.5) else -13  # away from the axes
        taken.append((start, start + width, y))
        dot.update(
            label_x=_round(start + width if end else start), label_y=_round(y), anchor="end" if end else "start"
        )


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:13]}…{name[-8:]}"  # the end tells one run from another


def _x(share: float) -> float:
    return _round(50 + 350 * share)


def _y(share: float) -> float:
    return _round(280 - 260 * share)


def _round(value: float) -> float:
    return round(value, 2)
