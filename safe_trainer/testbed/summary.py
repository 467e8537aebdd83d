"""What the demo shows: a table with counts and intervals, the verdict on each variant, and a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from rich.table import Table

from ..evaluation import Comparison, Evaluation, Rate, to_markdown
from .experiment import Scenario

INTRODUCTION = (
    "A tiny chat model that refuses harmful prompts is fine-tuned on the data of each scenario, with and without "
    "protection, and asked the same test prompts before and after. All harmful text is inert. The model has one "
    "million parameters: its results show how the tools work and do not carry over to other models."
)
REAL = (
    "SmolLM2-135M-Instruct, made to refuse harmful prompts, is fine-tuned on 100 harmful rows, with and without "
    "protection, and asked the same test prompts before and after. All harmful text is inert. This is a real chat "
    "model, but a small one, and it was aligned for this demo: compare yours before you rely on any of it."
)
NEXT_STEPS = """\
  safe-trainer demo --methods all            # every method, same scenarios
  safe-trainer compare MODEL --adapter DIR   # your adapter against its base
  safe-trainer app                           # in the browser"""

Result = tuple[Scenario, Sequence[Comparison], Mapping[str, Sequence[float]]]


def title_of(variant: str) -> str:
    """Return what tables call a variant: the title on a method's card, or the variant's name."""
    from ..methods import METHODS

    method = METHODS.get(variant)
    return method.card.title if method is not None and method.card is not None else variant


def columns(scenario: Scenario) -> list[tuple[str, str, str]]:
    """List heading, prompt set and outcome of each column; harm is never shown without over-refusal and the task."""
    shown = [
        ("refusal rate: harmful", "harmful", "refused"),
        ("compliance: harmful", "harmful", "complied"),
        ("over-refusal: benign", "benign", "refused"),
        ("over-refusal: borderline", "borderline", "refused"),
    ]
    return [*shown, ("task: accuracy", scenario.task, "correct")] if scenario.task else shown


def pooled(evaluations: Iterable[Evaluation], prompt_set: str, outcome: str) -> Rate:
    """Add up counts over seeds. The interval is that of the pooled count."""
    rates = [evaluation[prompt_set].rate(outcome) for evaluation in evaluations]
    return Rate(sum(rate.count for rate in rates), sum(rate.total for rate in rates))


def names(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the names of what was compared, the model before first."""
    return [evaluation.name for evaluation in comparisons[0].evaluations]


def table(scenario: Scenario, comparisons: Sequence[Comparison], seconds: Mapping[str, Sequence[float]]) -> Table:
    """Return a scenario's table for a terminal of 80 columns: in each cell count, share and 95 % interval."""
    judge = next(iter(comparisons[0].before["harmful"].verdicts))
    title = f"\nFine-tuned on {scenario.title} ({scenario.steps} steps), judged by {judge}"
    shown = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 1, 0), pad_edge=False
    )
    shown.add_column("model")
    for heading, _, _ in columns(scenario):
        shown.add_column(heading.replace(": ", "\n"), justify="right", no_wrap=True)
    for name in names(comparisons):
        evaluations = [comparison[name] for comparison in comparisons]
        cells = []
        for _, prompt_set, outcome in columns(scenario):
            rate = pooled(evaluations, prompt_set, outcome)
            interval = f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
            cells.append(f"{rate.count}/{rate.total} {100 * rate.value:.0f} %\n{interval}")
        spent = seconds.get(name)
        shown.add_row(f"{name}\n{fmean(spent):.0f} s" if spent else name, *cells)
    return shown


def conclusions(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the verdict on each variant, for each seed if there are several."""
    several = len(comparisons) > 1
    return [
        f"{name}{f', seed {seed}' if several else ''}: {comparison.verdict(name).headline}"
        for name in names(comparisons)[1:]
        for seed, comparison in enumerate(comparisons)
    ]


def markdown(results: Iterable[Result], introduction: str = INTRODUCTION) -> str:
    """Return the demo's report: for each scenario and seed what `compare` writes, and where the rest is."""
    parts = ["# Refusals before and after fine-tuning", introduction]
    for scenario, comparisons, seconds in results:
        parts.append(f"# Fine-tuned on {scenario.title}")
        spent = ", ".join(f"{name} {fmean(times):.0f} s" for name, times in seconds.items())
        parts.append(f"{scenario.steps} steps of {scenario.batch_size} rows; training took: {spent}.")
        for seed, comparison in enumerate(comparisons):
            parts.append(f"Seed {seed}, every answer and its verdict: `{scenario.name}/seed-{seed}/comparison.html`.")
            parts.append(to_markdown(comparison).strip())
    parts.append(
        "Settings were chosen on validation prompts; these are test prompts, none of which is in the training data."
    )
    return "\n\n".join(parts) + "\n"
