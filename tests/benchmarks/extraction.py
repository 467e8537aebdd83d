"""Memory and time that an alignment direction takes from a large pair of checkpoints, in a process of its own.

    python tests/benchmarks/extraction.py                      # two random checkpoints of 1.1 GB each, in bfloat16
    python tests/benchmarks/extraction.py --layers 4 --modules "q_proj|v_proj"

What counts is by how much the process grows at most, beside the size of the checkpoints. For Linux.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import memory
import step_time

from safe_trainer import AlignmentDirection


def extract(pair: tuple[str, str], modules: str, output: str) -> tuple[float, float]:
    """Return by how many MB this process grew at most, and the CPU seconds."""
    torch.set_num_threads(1)
    before = memory.resident("VmRSS")
    memory.forget()
    start = time.process_time()
    AlignmentDirection.from_checkpoints(*pair, modules=modules or None, output=output)
    return memory.resident("VmHWM") - before, time.process_time() - start


def measure(hidden: int = 2048, layers: int = 14, modules: str = "") -> dict[str, float]:
    """Return the size of one checkpoint and of the largest weight, the growth, and the time."""
    with tempfile.TemporaryDirectory() as folder:
        pair = step_time.save_pair(folder, hidden, layers, torch.bfloat16)
        size = sum(path.stat().st_size for path in Path(pair[0]).glob("*.safetensors")) / 1e6
        growth, seconds = memory.apart(extract, pair, modules, f"{folder}/direction.safetensors")
        written = Path(f"{folder}/direction.safetensors").stat().st_size / 1e6
    largest = 2 * hidden**2 * 4 / 1e6  # of the feed-forward layers, in float32
    return {
        "checkpoint_mb": size,
        "largest_weight_mb": largest,
        "growth_mb": growth,
        "file_mb": written,
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Measure and write one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--modules", default="", help="a regular expression; every linear layer if left out")
    arguments = parser.parse_args()
    sys.stdout.write(", ".join(f"{name} {value:.0f}" for name, value in measure(**vars(arguments)).items()) + "\n")


if __name__ == "__main__":
    main()
