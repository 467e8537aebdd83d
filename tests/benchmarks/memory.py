"""Peak memory of each method's training steps against plain `SFTTrainer`, each in a process of its own.

    python tests/benchmarks/memory.py                          # Llama, hidden 1024, 8 layers, 4 x 256 tokens, r = 16
    python tests/benchmarks/memory.py --only SaLoRA

What a process holds before its trainer is built (Python, torch, transformers) is no part of the comparison. Building
it, with all that a method measures and decomposes, is counted apart from the steps. For Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import step_time
import tiny


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
    parser.add_argument("--only", default="", help="only variants whose name holds this, beside plain SFTTrainer")
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = tiny.save_pair(folder, hidden=arguments.hidden, layers=arguments.layers)
        for name in step_time.variants(pair, arguments):
            if arguments.only in name or "plain" in name:
                with processes.Pool(1) as pool:
                    found[name] = pool.apply(peaks, (arguments, pair, name))
    plain = found["plain SFTTrainer"]
    sys.stdout.write("| variant | steps, MB | ratio | building, MB | ratio |\n|---|---|---|---|---|\n")
    for name, (building, steps) in found.items():
        ratios = building / plain[0], steps / plain[1]
        sys.stdout.write(f"| {name} | {steps:.0f} | {ratios[1]:.3f} | {building:.0f} | {ratios[0]:.3f} |\n")


if __name__ == "__main__":
    main()
