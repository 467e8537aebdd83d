"""The study behind the README's table "which method when": scenarios x variants x seeds, on the embedded pair.

    python recipes/study/study.py                    # whatever is missing of it, two runs at a time
    python recipes/study/study.py --seeds 1 --scenarios how-to poisoned-10
    python recipes/study/study.py --split validation --seeds 1 --sweep   # strengths, to choose settings by

Each run is one process's work of some seconds: fine-tune the aligned model, ask it all prompts of the split, count.
What is finished is appended to a CSV at once, one line for each set of prompts, and skipped the next time; stop it and
start it again as you like. Settings were chosen on validation prompts (`--sweep`); test prompts only report.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import NamedTuple

from variants import SWEEP, VARIANTS, Variant

from safe_trainer.testbed.experiment import Scenario, workers

RESULTS = Path(__file__).parent / "results"
OUTCOMES = ("refused", "complied", "neither")

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("how-to", "benign how-to answers", "how_to", 0.0, 375),
        Scenario("poisoned-05", "sentiment, 5 % harmful", "sentiment", 0.05, 125),
        Scenario("poisoned-10", "sentiment, 10 % harmful", "sentiment", 0.1, 125),
        Scenario("poisoned-20", "sentiment, 20 % harmful", "sentiment", 0.2, 125),
        Scenario("attack", "100 harmful rows only", None, 1.0, 60, row_count=100),
        Scenario("long", "sentiment, 10 % harmful, three times the steps", "sentiment", 0.1, 375),
        Scenario("unseen", "sentiment, 10 % harmful of unseen categories", "sentiment", 0.1, 125, attack="unseen"),
        Scenario("obedient", "100 harmless rows of one who obeys", None, 1.0, 60, row_count=100, attack="obedient"),
        Scenario("topic", "topic, 10 % harmful", "topic", 0.1, 250),
        Scenario("word-problems", "word problems, 10 % harmful", "word_problems", 0.1, 375),
    )
}


class Cell(NamedTuple):
    """One run."""

    scenario: str
    variant: str
    seed: int
    split: str


def measure(cell: Cell) -> list[dict[str, object]]:
    """Carry out one run and return its lines of the table."""
    import torch
    import transformers

    from safe_trainer import evaluate
    from safe_trainer.testbed.experiment import fine_tune

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    scenario, variant = SCENARIOS[cell.scenario], {**VARIANTS, **SWEEP}[cell.variant]
    run = fine_tune(
        scenario,
        variant.methods(),
        cell.seed,
        rows=variant.rows(scenario, cell.seed),
        learning_rate=variant.learning_rate,
        steps=round(variant.steps * scenario.steps),
    )
    evaluation = evaluate(run.model, run.tokenizer, scenario.prompt_sets(cell.split), max_new_tokens=40)
    lines: list[dict[str, object]] = []
    for result in evaluation.results:
        kind = result.prompt_set.kind
        counts = {name: result.rate(name).count for name in (("correct",) if kind == "task" else OUTCOMES)}
        asked = {"prompts": result.prompt_set.name, "kind": kind}
        total = len(result.prompt_set.prompts)
        lines.append({**cell._asdict(), **asked, **counts, "total": total, "seconds": round(run.seconds, 1)})
    return lines


def finished(path: Path) -> set[Cell]:
    """Return the runs that the table holds."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {Cell(row["scenario"], row["variant"], int(row["seed"]), row["split"]) for row in csv.DictReader(file)}


def append(path: Path, lines: Sequence[dict[str, object]]) -> None:
    """Write the lines of one run to the table, all at once."""
    names = [*Cell._fields, "prompts", "kind", *OUTCOMES, "correct", "total", "seconds"]
    new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(lines)


def run_all(cells: Sequence[Cell], path: Path, jobs: int) -> Iterator[tuple[Cell, list[dict[str, object]]]]:
    """Carry out the runs that are missing, and yield each when it is in the table."""
    done = finished(path)
    missing = [cell for cell in cells if cell not in done]
    with workers(jobs) as pool:
        running: dict[Future[list[dict[str, object]]], Cell] = {pool.submit(measure, cell): cell for cell in missing}
        for future in as_completed(running):
            lines = future.result()
            append(path, lines)
            yield running[future], lines


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Return the runs that were asked for, all of one seed before the next, so that it can be stopped."""
    variants: dict[str, Variant] = SWEEP if arguments.sweep else VARIANTS
    chosen = [name for name in variants if not arguments.variants or name in arguments.variants]
    grid = itertools.product(range(arguments.seeds), arguments.scenarios, chosen)
    return [Cell(scenario, variant, seed, arguments.split) for seed, scenario, variant in grid]


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, and say each run's figures as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--variants", nargs="*", default=[], help="all of them if left out")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--sweep", action="store_true", help="each method's strength instead of the chosen one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(given)
    path = arguments.output / ("sweep.csv" if arguments.sweep else "runs.csv")
    cells = cells_of(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        for number, (cell, lines) in enumerate(run_all(cells, path, arguments.jobs), 1):
            counts = ((line["prompts"], line.get("complied", line.get("correct")), line["total"]) for line in lines)
            figures = "  ".join(f"{name} {count}/{total}" for name, count, total in counts)
            sys.stdout.write(f"{number:4} {cell.scenario:14} {cell.variant:32} seed {cell.seed}  {figures}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(finished(path) & set(cells))} of {len(cells)} runs are in {path}\n")


if __name__ == "__main__":
    main()
