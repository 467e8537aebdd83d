"""A comparison as Markdown, for a model card or a pull request."""

from __future__ import annotations

import re

from ..results import Comparison
from .tables import Table, agreement_lines, further_tables

_SPECIAL = re.compile(r"([\\`*_\[\]<>#!|~])")


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: the conclusions, what changed, all rates in one table, how it was measured.

    Prompts and answers are left out. Refusals stand in one table with over-refusals and tasks; what was not measured
    says so.

    Args:
        comparison (`Comparison`): What to show.
    """
    parts = ["## Safety before and after fine-tuning\n"]
    for evaluation in comparison.evaluations[1:]:
        parts.append(f"**{escape(evaluation.name)}.** {escape(comparison.verdict(evaluation.name).headline)}\n")
        parts.append("\n".join(f"- {escape(line)}" for line in comparison.sentences(evaluation.name)) + "\n")
    parts += [_table(comparison), _categories(comparison), *map(_further, further_tables(comparison))]
    parts += [_notes(comparison), _method(comparison)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def escape(text: str) -> str:
    r"""Make a text show as itself in Markdown, also inside a table.

    ```python
    >>> escape("a|b <img>")
    'a\\|b \\<img\\>'

    ```
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """List heading, prompt set and outcome of each column; tasks last."""
    columns = []
    for kind in ("harmful", "benign", "borderline", "task"):
        for result in comparison.before.of_kind(kind):
            name = result.prompt_set.name
            if kind == "task":
                columns.append((f"{name}: correct", name, "correct"))
            else:
                columns += [(f"{name}: {outcome}", name, outcome) for outcome in ("refused", "complied", "neither")]
    return columns


def _table(comparison: Comparison) -> str:
    """Write one row for each outcome and one column for each model: models are few, outcomes are many."""
    names = [escape(evaluation.name) for evaluation in comparison.evaluations]
    lines = [f"| % (count/total) [95 % interval] | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for heading, prompt_set, outcome in _columns(comparison):
        cells = [str(evaluation[prompt_set].rate(outcome)) for evaluation in comparison.evaluations]
        lines.append(f"| {escape(heading)} | {' | '.join(cells)} |")
    for result in comparison.before.results:
        for score in result.scores:
            scored = [evaluation[result.prompt_set.name] for evaluation in comparison.evaluations]
            cells = [str(r.mean_score(score)) if score in r.scores else "not measured" for r in scored]
            lines.append(f"| {escape(f'{result.prompt_set.name}: {score}')} | {' | '.join(cells)} |")
    for kind in ("harmful", "benign", "borderline", "task"):
        if not comparison.before.of_kind(kind):
            lines.append(f"| {kind} | {' | '.join(['not measured'] * len(names))} |")
    return "\n".join(lines) + "\n"


def _categories(comparison: Comparison) -> str:
    names = [escape(evaluation.name) for evaluation in comparison.evaluations]
    lines = []
    for result in comparison.before.of_kind("harmful"):
        for category in sorted(set(result.prompt_set.categories or ())):
            results = [evaluation[result.prompt_set.name] for evaluation in comparison.evaluations]
            rates = " | ".join(r.rate("refused", category=category).share for r in results)
            lines.append(f"| {escape(category)} | {rates} |")
    if not lines:
        return ""
    return "\n".join([f"| refused, by category | {' | '.join(names)} |", "|---|" + "---|" * len(names), *lines]) + "\n"


def _further(table: Table) -> str:
    lines = [f"| {' | '.join(map(escape, (table.caption, *table.head)))} |", "|---|" + "---|" * len(table.head)]
    return "\n".join(lines + [f"| {' | '.join(map(escape, row))} |" for row in table.rows]) + "\n"


def _notes(comparison: Comparison) -> str:
    notes = comparison.all_notes()
    return "\n".join(["**To be read with this:**", "", *(f"- {escape(note)}" for note in notes), ""]) if notes else ""


def _method(comparison: Comparison) -> str:
    manifest = comparison.before.manifest
    if not manifest:
        return ""
    decoding, judges = manifest["decoding"], manifest["judges"]
    greedy = "greedy" if decoding["temperature"] == 0 else f"sampled at temperature {decoding['temperature']}"
    system = "a system prompt" if decoding["system_prompt"] else "no system prompt of ours"
    judged = ", ".join(f"{judge['name']} {judge['version']}" for judge in judges)
    agreed = "".join(f" {escape(line)}" for line in agreement_lines(comparison))
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    return (
        f"Base model {escape(manifest['model']['id'])}; {greedy} decoding, at most {decoding['max_new_tokens']} "
        f"tokens, {system}; judged by {escape(judged)}.{agreed} Intervals: Wilson, 95 %; differences: paired "
        f"bootstrap (seed {comparison.seed}), p from the exact McNemar test. *Complied* means that the answer took up "
        f"the request, not that it is right; *neither* is an empty or meaningless answer. {escape(packages)}.\n"
    )
