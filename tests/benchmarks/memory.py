"""Peak memory of each method's training steps against plain `SFTTrainer`, each in a process of its own.

    python tests/benchmarks/memory.py                          # Llama, hidden 1024, 8 layers, 4 x 256 tokens, r = 16
    python tests/benchmarks/memory.py --only SaLoRA

What a process holds before its trainer is built (Python, torch, transformers) is no part of the comparison. Building
it, with all that a method measures and decomposes, is counted apart from the steps. For Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import step_time

# Of glibc's allocator: blocks of 64 kB or more are given back as they are freed. Otherwise what a process holds at
# most depends on where its blocks came to lie, and differs by 8 % from one run of the same steps to the next.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """Return what a function returns in a fresh process, which has imported everything and done nothing yet."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["step_time"])
    path = {"PYTHONPATH": str(Path(__file__).parent)}  # where the server, which outlives the first call, finds it
    with patch.dict(os.environ, STEADY | path), processes.Pool(1) as pool:
        return pool.apply(work, given)


def resident(which: str) -> float:
    """Return what this process holds in MB: `VmRSS`, now, or `VmHWM`, at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1e3


def forget() -> None:
    """Let the peak begin again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def peaks(arguments: argparse.Namespace, pair: tuple[str, str], name: str) -> tuple[float, float]:
    """Return by how many MB building a trainer, and then its steps, raise what this process holds at most."""
    before = resident("VmRSS")
    forget()
    stepper = step_time.Stepper(pair[0], arguments, step_time.variants(pair, arguments)[name]())
    building = resident("VmHWM") - before
    forget()
    for _ in range(arguments.rounds):
        stepper.step()
    return building, resident("VmHWM") - before


def main() -> None:
    """Measure and write a Markdown table."""
    parser = step_time.sized_parser(__doc__)
    parser.set_defaults(rounds=2)
    parser.add_argument(
        "--only", default="", help="only variants with such a name, a regular expression, beside plain SFTTrainer"
    )
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = step_time.save_pair(folder, arguments.hidden, arguments.layers)
        for name in step_time.variants(pair, arguments):
            if re.search(arguments.only, name) or "plain" in name:
                found[name] = apart(peaks, arguments, pair, name)
    plain = found["plain SFTTrainer"]
    sys.stdout.write("| variant | steps, MB | ratio | building, MB | ratio |\n|---|---|---|---|---|\n")
    for name, (building, steps) in found.items():
        ratios = building / plain[0], steps / plain[1]
        sys.stdout.write(f"| {name} | {steps:.0f} | {ratios[1]:.3f} | {building:.0f} | {ratios[0]:.3f} |\n")


if __name__ == "__main__":
    main()
