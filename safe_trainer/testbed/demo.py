"""`safe-trainer demo`: what fine-tuning does to refusals, with and without protection, on the embedded pair.

Each scenario is trained once for each variant and seed, and examined on test prompts next to the model before.
Settings were chosen on validation prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.text import Text

from .. import testbed
from ..evaluation import Comparison
from . import summary
from .experiment import (
    PLAIN,
    RECOMMENDED,
    SCENARIOS,
    Scenario,
    advance,
    fine_tune,
    variant_names,
    variants,
    work_counter,
    workers,
)

SHOWN = ("poisoned", "how-to", "identity")
QUICK = ("poisoned",)
MAX_NEW_TOKENS = 40
EXAMINATION = 20  # the work of asking one model all prompts, in optimizer steps
PREPARATION = 40  # the work of preparing methods before the first step


@dataclass
class Outcome:
    """The results of one scenario.

    Args:
        scenario ([`Scenario`]): The scenario.
        comparisons (`list[Comparison]`): One for each seed: before, then every variant.
        seconds (`dict[str, list[float]]`): Training time of each variant, by seed.
    """

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
) -> list[Outcome]:
    """Run the demo and write its report.

    Args:
        output_dir (`Path`): Folder for `report.md`, and for each scenario the comparison and the adapters.
        quick (`bool`, *optional*, defaults to `False`): One scenario instead of three.
        seeds (`int`, *optional*, defaults to `1`): Runs of each scenario; counts are pooled over them.
        methods (`Sequence[str]`, *optional*, defaults to `("recommended",)`): What to show next to plain LoRA:
            `"recommended"` and keys of `METHODS`.
        console (`Console`, *optional*): Where to show progress and tables.

    Returns:
        `list[Outcome]`: One for each scenario.

    Raises:
        ValueError: If there is no such method.
    """
    unknown = [name for name in methods if name not in variant_names()[1:]]
    if unknown:
        raise ValueError(f"`methods` must be among {', '.join(variant_names()[1:])}, got `{unknown[0]}`.")
    console, start, output = console or Console(), time.perf_counter(), Path(output_dir)
    shown = [PLAIN, *(name for name in methods if name != PLAIN)]
    outcomes = [Outcome(SCENARIOS[name]) for name in (QUICK if quick else SHOWN)]
    console.print(Text(summary.INTRODUCTION, "dim"))
    with closing(_measured(outcomes, shown, seeds, output, console)) as measured:
        for outcome in measured:
            _show(outcome, console)
            finished = [(o.scenario, o.comparisons, o.seconds) for o in outcomes if len(o.comparisons) == seeds]
            output.mkdir(parents=True, exist_ok=True)  # Ctrl-C keeps the scenarios that are finished
            (output / "report.md").write_text(summary.markdown(finished), encoding="utf-8")
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. The report is saved to {output / 'report.md'};")
    console.print(f"adapters and every answer are in {output}/<scenario>/. Next:\n")
    console.print(summary.NEXT_STEPS, highlight=False)
    return outcomes


def _measured(
    outcomes: Sequence[Outcome], shown: Sequence[str], seeds: int, output: Path, console: Console
) -> Generator[Outcome, None, None]:
    """Run every scenario and seed in two processes, and yield each outcome when its last seed is finished."""
    total = seeds * sum(_work(outcome.scenario, shown) for outcome in outcomes)
    counter = work_counter()
    with _progress(console, total) as update, workers(2, counter) as pool:
        pending: dict[Future[Job], Outcome] = {
            pool.submit(run_scenario, outcome.scenario.name, shown, seed, output): outcome
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


def run_scenario(name: str, shown: Sequence[str], seed: int, output: Path) -> Job:
    """Fine-tune each variant of a scenario, then ask all models the same prompts; runs in a worker process.

    Args:
        name (`str`): Key of `SCENARIOS`.
        shown (`Sequence[str]`): Names of variants.
        seed (`int`): Seed of data, order and initialization.
        output (`Path`): The demo's folder; adapters and comparison go into `<scenario>/seed-<seed>/`.

    Returns:
        `tuple[Comparison, dict[str, float]]`: The comparison, and each variant's training time in seconds.
    """
    from ..evaluation import compare, write_report
    from ..lora.loading import load_model

    scenario, folder, made = SCENARIOS[name], output / name / f"seed-{seed}", variants()
    adapters: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for variant in shown:
        title, adapter = summary.title_of(variant), folder / variant.replace(" ", "-")
        seconds[title] = fine_tune(scenario, made[variant](), seed, adapter).seconds
        adapters[title] = adapter
        advance(PREPARATION * (variant != PLAIN))
    model, tokenizer = load_model(testbed.ALIGNED, dtype="float32")
    comparison = compare(model, tokenizer, scenario.prompt_sets("test"), adapters, max_new_tokens=MAX_NEW_TOKENS)
    advance(EXAMINATION * (1 + len(shown)))
    write_report(comparison, folder)
    return comparison, seconds


def _work(scenario: Scenario, shown: Sequence[str]) -> float:
    prepared = PREPARATION * (len(shown) - 1)
    return scenario.steps * len(shown) + prepared + EXAMINATION * (1 + len(shown))


def _show(outcome: Outcome, console: Console) -> None:
    console.print(summary.table(outcome.scenario, outcome.comparisons, outcome.seconds))
    for line in summary.conclusions(outcome.scenario, outcome.comparisons):
        console.print(Text("  " + line))


@contextmanager
def _progress(console: Console, total: float) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how much is done and the time left."""
    columns: list[Any] = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("fine-tuning and asking", total=total)
        yield lambda done: bar.update(task, completed=done)
