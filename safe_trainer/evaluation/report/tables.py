"""Tables that a report has only when there is something to put into them: several runs, several judges."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import HEADLINES, Comparison, SetResult, agreements


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        caption (`str`): What it shows.
        head (`tuple[str, ...]`): The heading of each column but the first, which names the rows.
        rows (`tuple[tuple[str, ...], ...]`): The cells, the name of the row first.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def further_tables(comparison: Comparison) -> list[Table]:
    """Return the tables of a comparison's training runs and of its judges, where there are several.

    Args:
        comparison (`Comparison`): What to show.
    """
    return [*_runs(comparison), *_judges(comparison)]


def agreement_lines(comparison: Comparison) -> tuple[str, ...]:
    """Say for each model how far each two judges agree, in sentences; nothing where one judged alone."""
    return tuple(f"{e.name}: {agreement}." for e in comparison.evaluations for agreement in agreements(e))


def _runs(comparison: Comparison) -> list[Table]:
    groups = {name: runs for name, runs in comparison.runs.items() if len(runs) > 1}
    if not groups:
        return []
    rows = []
    for result, outcome in _outcomes(comparison):
        name = result.prompt_set.name
        cells = []
        for group, runs in groups.items():
            measured = all(comparison[run][name].rate(outcome).total for run in runs)
            cells.append(str(comparison.spread(group, name, outcome)) if measured else "not measured")
        rows.append((f"{name}: {outcome}", result.rate(outcome).share, *cells))
    caption = "Mean over training runs that differ in their seed [95 % interval of the mean]"
    return [Table(caption, (comparison.before.name, *groups), tuple(rows))]


def _judges(comparison: Comparison) -> list[Table]:
    rows = []
    for result, outcome in _outcomes(comparison):
        name = result.prompt_set.name
        if len(result.verdicts) == 1 or outcome == "neither":
            continue
        for judge in result.verdicts:
            cells = [str(e[name].rate(outcome, judge=judge)) for e in comparison.evaluations]
            rows.append((f"{name}: {outcome} ({judge})", *cells))
    names = tuple(evaluation.name for evaluation in comparison.evaluations)
    return [Table("Each judge by itself", names, tuple(rows))] if rows else []


def _outcomes(comparison: Comparison) -> list[tuple[SetResult, str]]:
    """List what is counted of each prompt set, in the order of the reports."""
    found = []
    for kind, headline in HEADLINES.items():
        for result in comparison.before.of_kind(kind):
            outcomes = (headline,) if kind == "task" else ("refused", "complied", "neither")
            found += [(result, outcome) for outcome in outcomes]
    return found
