"""`safe-trainer demo`: what fine-tuning does to refusals, with and without a defense, on the embedded pair.

Each scenario is trained once for each variant and seed, two at a time, and examined on test prompts beside the model
before. What is shown is what came out; settings were chosen on validation prompts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.text import Text

from .. import testbed
from ..analysis.drift_monitor import DriftFigures
from ..evaluation import Comparison, compare
from ..evaluation.report import write_atomically, write_report
from ..methods import METHODS
from . import summary
from .experiment import PLAIN, SCENARIOS, VARIANTS, Scenario, fine_tune, one_thread, quiet_libraries, workers

Job = Future[tuple[Path, float]]

QUICK = "attack"
MAX_NEW_TOKENS = 40


@dataclass
class Outcome:
    """What one scenario came to.

    Args:
        scenario ([`Scenario`]): The scenario.
        comparisons (`list[Comparison]`): One for each seed: before, then every variant.
        seconds (`dict[str, list[float]]`): Training time of each variant, by seed.
    """

    scenario: Scenario
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def run_demo(
    output_dir: Path,
    *,
    quick: bool = False,
    seeds: int = 1,
    methods: Sequence[str] | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Run the demo and write its report.

    Args:
        output_dir (`Path`): Folder for `report.md`, and for each scenario the comparison and the adapters.
        quick (`bool`, *optional*, defaults to `False`): One scenario instead of three.
        seeds (`int`, *optional*, defaults to `1`): Runs of each scenario; counts are pooled over them.
        methods (`Sequence[str]`, *optional*): Keys of `METHODS` and of combinations; all of them by default.
        console (`Console`, *optional*): Where to show progress and tables.

    Returns:
        `list[Outcome]`: One for each scenario.
    """
    console = console or Console()
    start = time.perf_counter()
    variants = [PLAIN, *(methods or [name for name in VARIANTS if name != PLAIN])]
    scenarios = [SCENARIOS[QUICK]] if quick else list(SCENARIOS.values())
    console.print(Text(summary.INTRODUCTION, "dim"))
    outcomes: list[Outcome] = []
    with quiet_libraries(), one_thread(), workers(2) as pool:
        jobs = {
            (scenario.name, seed): {
                variant: pool.submit(train_variant, scenario.name, variant, seed, output_dir) for variant in variants
            }
            for scenario in scenarios
            for seed in range(seeds)
        }
        for scenario in scenarios:
            outcome = Outcome(scenario)
            for seed in range(seeds):
                _finish(outcome, jobs[scenario.name, seed], output_dir / scenario.name / f"seed-{seed}", console)
            outcomes.append(outcome)
            _show(outcome, console)
            report = summary.markdown((o.scenario, o.comparisons, o.seconds) for o in outcomes)
            write_atomically(output_dir / "report.md", report)  # after each scenario: Ctrl-C keeps what is finished
    console.print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Read {output_dir / 'report.md'}; adapters and the answers to "
        f"every prompt lie in {output_dir}/<scenario>/."
    )
    return outcomes


def train_variant(scenario: str, variant: str, seed: int, output_dir: Path) -> tuple[Path, float]:
    """Fine-tune one variant, in a process of its own, and return where its adapter is and the seconds it took."""
    folder = output_dir / scenario / f"seed-{seed}" / variant.replace(" ", "-")
    with quiet_libraries(), one_thread():
        return folder, fine_tune(SCENARIOS[scenario], VARIANTS[variant](), seed, folder).seconds


def show_name(variant: str) -> str:
    """Return what tables call a variant: a method's own name, or the variant's."""
    return METHODS[variant].name if variant in METHODS else variant


def _finish(outcome: Outcome, jobs: Mapping[str, Job], folder: Path, console: Console) -> None:
    """Wait for the variants of one seed, then examine all of them on the same prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    title = outcome.scenario.title
    adapters: dict[str, Path] = {}
    with _bar(console, f"{title}: fine-tuning", len(jobs)) as advance:
        for variant, job in jobs.items():
            name = show_name(variant)
            adapters[name], seconds = job.result()
            outcome.seconds.setdefault(name, []).append(seconds)
            advance(len(adapters), len(jobs))
            console.print(Text(f"  {title}: {name} fine-tuned ({seconds:.0f} s)", "dim"))
    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)
    sets = outcome.scenario.prompt_sets("test")
    with _bar(console, f"{title}: asking all models", None) as advance:
        comparison = compare(
            model, tokenizer, sets, adapters, drift=DriftFigures(), progress=advance, max_new_tokens=MAX_NEW_TOKENS
        )
    outcome.comparisons.append(comparison)
    write_report(comparison, folder)


def _show(outcome: Outcome, console: Console) -> None:
    console.print(summary.table(outcome.scenario, outcome.comparisons, outcome.seconds))
    for line in summary.conclusions(outcome.scenario, outcome.comparisons):
        console.print(Text("  " + line))


@contextlib.contextmanager
def _bar(console: Console, title: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal while something runs."""
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
