"""A comparison as one HTML file that needs no network and runs nothing that a model said."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..results import HEADLINES, Comparison, Evaluation
from ..statistics import Rate
from . import charts
from .evidence import evidence
from .tables import Table, agreement_lines, further_tables

SHOWN_FLIPS = 50  # of each set and model; the JSON beside the report has all

_TEMPLATES = Path(__file__).with_name("templates")
_WORDS = {
    "eroded": ("▼", "safety eroded"),
    "kept": ("✓", "safety kept"),
    "improved": ("▲", "safety improved"),
    "unclear": ("?", "not clear"),
    "no_baseline": ("!", "no safety to keep"),
    "unchanged": ("=", "nothing was learned"),
}
_SHARES = {
    "": "‖ΔW‖ / ‖W‖ of each weight that the adapter changes",
    "alignment": "Share of the change that lies along the alignment direction",
    "outputs": "Share of the change that writes where the model writes when it refuses",
    "inputs": "Share of the change that reads where the model reads harmful prompts",
    "refusal": "How much is left of the direction in which harmful prompts differ from harmless ones",
}
_WANTED = {
    "harmful": "Harmful prompts: refusing is right.",
    "benign": "Harmless prompts: refusing is wrong.",
    "borderline": "Prompts that only sound harmful: refusing is wrong.",
    "task": "A task: right answers.",
}


def to_html(comparison: Comparison) -> str:
    """Return the comparison as one HTML document.

    Everything is in the file: no fonts, scripts, styles or pictures from elsewhere, and a Content-Security-Policy that
    lets nothing but its own script run. Prompts, answers and names are shown as text, whatever they contain; those of
    harmful sets are blurred until the reader asks for them. Light and dark follow the reader's system.

    Args:
        comparison (`Comparison`): What to show.

    Example:

    ```python
    Path("report.html").write_text(to_html(comparison), encoding="utf-8")
    ```
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # Both go into the page unescaped, which is right: they are ours, and the policy names their hashes.
    style, script = (Markup((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script), **_content(comparison)
    )


def _content(comparison: Comparison) -> dict[str, Any]:
    """Collect what the template shows, as plain values."""
    manifest = comparison.before.manifest
    drifts = charts.heats(comparison.evaluations)
    flips = _flips(comparison)
    plane = charts.plane(comparison.evaluations)
    optional = {"trade-off": plane, "flips": flips, "drift": drifts}
    contents = {
        "verdict": "Verdict", "rates": "Rates", "trade-off": "Trade-off", "numbers": "Numbers",
        "flips": "Changed prompts", "drift": "Layers", "evidence": "Tested and not tested", "manifest": "Manifest",
    }  # fmt: skip
    return {
        "title": manifest.get("model", {}).get("id", "Unknown model"),
        "subtitle": f"{len(comparison.evaluations)} models compared · {_date(manifest)}",
        "contents": [(key, label) for key, label in contents.items() if optional.get(key, True)],
        "before": comparison.before.name,
        "verdicts": _verdicts(comparison),
        "notes": comparison.all_notes(),
        "groups": _groups(comparison),
        "missing_kinds": [_WANTED[kind] for kind in HEADLINES if not comparison.before.of_kind(kind)],
        "plane": plane,
        "tables": _tables(comparison),
        "flips": flips,
        "drifts": [{"words": _SHARES.get(d["figure"], d["figure"]), "tables": d["tables"]} for d in drifts],
        "evidence": evidence(comparison),
        "agreements": agreement_lines(comparison),
        "manifest": [{"name": e.name, "entries": _flat(e.manifest)} for e in comparison.evaluations],
        "version": manifest.get("packages", {}).get("safe-trainer", ""),
    }


def _verdicts(comparison: Comparison) -> list[dict[str, Any]]:
    verdicts = []
    for evaluation in comparison.evaluations[1:]:
        conclusion = comparison.verdict(evaluation.name)
        sign, word = _WORDS[conclusion.level]
        shown = {
            "level": conclusion.level,
            "headline": _tight(conclusion.headline),
            "details": [_tight(line) for line in conclusion.details],
        }
        facts = _facts(comparison, evaluation)
        verdicts.append({"name": evaluation.name, "sign": sign, "word": word, "facts": facts, **shown})
    return verdicts


def _facts(comparison: Comparison, evaluation: Evaluation) -> list[dict[str, str]]:
    """Return what stands under every verdict: refusals never without over-refusals, help and tasks."""
    asked = {
        "Harmful prompts refused": (("harmful",), "refused"),
        "Harmless prompts refused": (("benign", "borderline"), "refused"),
        "Harmless prompts answered": (("benign", "borderline"), "complied"),
        "Tasks correct": (("task",), "correct"),
    }
    facts = []
    for name, (kinds, outcome) in asked.items():
        old, new = (charts.pooled(e, kinds, outcome) for e in (comparison.before, evaluation))
        measured = old.total and new.total
        facts.append({"name": name, "value": f"{old.share} → {new.share}" if measured else "not measured"})
    return facts


def _groups(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one group of bars for each prompt set, with a bar for each model."""
    return [
        {
            "title": result.prompt_set.name,
            "wanted": _WANTED[kind],
            "rows": [charts.row(e.name, e[result.prompt_set.name]) for e in comparison.evaluations],
        }
        for kind in HEADLINES
        for result in comparison.before.of_kind(kind)
    ]


def _tables(comparison: Comparison) -> list[dict[str, Any]]:
    names = [evaluation.name for evaluation in comparison.evaluations]
    rows = []
    for kind, headline in HEADLINES.items():
        outcomes = ("correct",) if headline == "correct" else ("refused", "complied", "neither")
        for result in comparison.before.of_kind(kind):
            name = result.prompt_set.name
            rows += [(f"{name}: {o}", *(_cell(e[name].rate(o)) for e in comparison.evaluations)) for o in outcomes]
            rows += [(f"{name}: {score}", *_means(comparison, name, score)) for score in result.scores]
    tables = [{"caption": "Rate (count/total) [95 % interval]", "head": ("", *names), "rows": rows}]
    for result in comparison.before.of_kind("harmful"):
        name = result.prompt_set.name
        per_category = [
            (category, *(_cell(e[name].rate("refused", category=category)) for e in comparison.evaluations))
            for category in result.by_category("refused")
        ]
        if per_category:
            tables.append({"caption": f"{name}: refused, by category", "head": ("", *names), "rows": per_category})
    return tables + [_further(table) for table in further_tables(comparison)]


def _further(table: Table) -> dict[str, Any]:
    rows = [(name, *(_split(cell) for cell in cells)) for name, *cells in table.rows]
    return {"caption": table.caption, "head": ("", *table.head), "rows": rows}


def _split(cell: str) -> dict[str, str]:
    """Set the interval below the rate that it belongs to."""
    share, bracket, interval = cell.partition(" [")
    return {"share": share, "interval": bracket.strip() + interval}


def _cell(rate: Rate) -> dict[str, str]:
    return {"share": rate.share, "interval": str(rate).removeprefix(rate.share).strip()}


def _means(comparison: Comparison, prompt_set: str, score: str) -> list[dict[str, str]]:
    results = [evaluation[prompt_set] for evaluation in comparison.evaluations]
    means = [str(r.mean_score(score)) if score in r.scores else "not measured" for r in results]
    return [{"share": mean, "interval": ""} for mean in means]


def _flips(comparison: Comparison) -> list[dict[str, Any]]:
    sets = []
    for evaluation in comparison.evaluations[1:]:
        for kind in HEADLINES:
            for result in comparison.before.of_kind(kind):
                found = comparison.flips(evaluation.name, result.prompt_set.name)
                if not found:
                    continue
                courses = Counter(f"{flip.outcome_before} → {flip.outcome_after}" for flip in found)
                summary = ", ".join(f"{count} × {course}" for course, count in courses.most_common())
                if len(found) > SHOWN_FLIPS:
                    summary += f"; the first {SHOWN_FLIPS} are shown, the JSON report has all"
                shown = [
                    {
                        "course": f"{flip.outcome_before} → {flip.outcome_after}"
                        + (f" · {flip.category}" if flip.category else ""),
                        "prompt": flip.prompt,
                        "before": flip.before.text or "(nothing)",
                        "after": flip.after.text or "(nothing)",
                    }
                    for flip in found[:SHOWN_FLIPS]
                ]
                title = f"{evaluation.name}, {result.prompt_set.name}"
                sets.append({"title": title, "name": evaluation.name, "summary": summary, "shown": shown,
                             "harmful": kind == "harmful"})  # fmt: skip
    return sets


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


def _tight(sentence: str) -> str:
    """Keep numbers and their signs on one line."""
    return sentence.replace(" %", "\u00a0%").replace("p = ", "p\u00a0=\u00a0").replace("p < ", "p\u00a0<\u00a0")


def _date(manifest: Mapping[str, Any]) -> str:
    return f"{datetime.fromisoformat(manifest['date']):%Y-%m-%d %H:%M} UTC" if "date" in manifest else "undated"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
