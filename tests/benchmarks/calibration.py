"""The calibration pass against a bare forward pass over the same rows: every linear layer of the model, in one pass.

    python tests/benchmarks/calibration.py                     # Llama, hidden 1024, 8 layers, 128 rows of 128 tokens
    python tests/benchmarks/calibration.py --answer 16 --rounds 9

Half of each row is answer, unless told otherwise. The passes take turns over the same batches; CPU time of the process
is compared, as in `step_time.py`. A bare pass goes through the body, as calibration does, or through the output head.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from safe_trainer.artifacts.calibration import Example, top_directions
from safe_trainer.lora.updates import linear_layers


def rows(arguments: argparse.Namespace) -> list[Example]:
    """Return rows of random tokens, the last of which are their answers."""
    ids = torch.randint(4, tiny.VOCABULARY, (arguments.rows, arguments.length)).tolist()
    answer = arguments.answer or arguments.length // 2
    return [Example(row, [i >= arguments.length - answer for i in range(arguments.length)]) for row in ids]


@torch.no_grad()
def bare(model: Any, examples: list[Example], batch_size: int) -> None:
    """Run a model over the rows and look at nothing."""
    for start in range(0, len(examples), batch_size):
        ids = torch.tensor([example.ids for example in examples[start : start + batch_size]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def passes(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what is compared."""
    model = tiny.model(hidden=arguments.hidden, layers=arguments.layers).eval()
    examples, layers = rows(arguments), linear_layers(model)

    def calibration(*sides: Any) -> Callable[[], Any]:
        settings = {"sides": sides, "rank": arguments.rank, "batch_size": arguments.batch}
        return lambda: top_directions(model, layers, examples, **settings)

    return {
        "bare pass": lambda: bare(model.base_model, examples, arguments.batch),
        "bare pass, with the output head": lambda: bare(model, examples, arguments.batch),
        "calibration, outputs": calibration("output"),
        "calibration, inputs": calibration("input"),
        "calibration, both": calibration("output", "input"),
    }


def spent(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return for each pass its median CPU time in seconds and its ratio to a bare one."""
    compared = passes(arguments)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(arguments.rounds):
        for name in random.Random(turn).sample(list(compared), len(compared)):
            times[name].append(spent(compared[name]))
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(seconds, times["bare pass"], strict=True))
        for name, seconds in times.items()
    }
    return {name: (statistics.median(seconds), ratios[name]) for name, seconds in times.items()}


def parsed(given: list[str]) -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "hidden": 1024,
        "layers": 8,
        "rows": 128,
        "length": 128,
        "answer": 0,
        "batch": 16,
        "rank": 32,
        "rounds": 5,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(given)


def main() -> None:
    """Measure and write a Markdown table."""
    arguments = parsed(sys.argv[1:])
    sys.stdout.write("| pass | CPU s | ratio |\n|---|---|---|\n")
    for name, (seconds, ratio) in measure(arguments).items():
        sys.stdout.write(f"| {name} | {seconds:.2f} | {ratio:.3f} |\n")
    sys.stdout.write(f"\nMedians of {arguments.rounds} rounds. torch {torch.__version__}\n")


if __name__ == "__main__":
    main()
