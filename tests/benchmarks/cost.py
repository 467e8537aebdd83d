"""What each method costs over a grid of sizes, written to RESULTS.md and results.json beside this file.

    python tests/benchmarks/cost.py                                  # the whole grid; hours on two quiet cores
    python tests/benchmarks/cost.py --hidden 256 512 --ranks 8 --rounds 5 --memory no

For each size: CPU time of a step and its ratio to plain `SFTTrainer` (medians of the rounds' own ratios, see
`step_time.py`), time to prepare, peak memory of the steps over plain `SFTTrainer` (each in a process of its own, see
`memory.py`), and how large the file is that a method needs. `calibration.py` and `generation.py` measure the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import memory
import step_time
import tiny

from safe_trainer import AlignmentDirection

HERE = Path(__file__).parent
LIBRARIES = ("safe_trainer", "torch", "transformers", "trl", "peft")


def artefacts(size: argparse.Namespace) -> dict[str, float]:
    """Return by artefact how many MB its file has for the modules that are trained."""
    with tempfile.TemporaryDirectory() as folder:
        pair = tiny.save_pair(folder, hidden=size.hidden, layers=size.layers)
        modules = None if size.targets == "all-linear" else size.targets.replace(",", "|")
        files = {
            "alignment direction": AlignmentDirection.from_checkpoints(*pair, modules=modules).save(f"{folder}/d"),
            "safety basis, inputs, rank 64": step_time.random_inputs(pair[0]).save(f"{folder}/b"),
            "security vectors, rank 8": step_time.random_vectors(pair[0]).save(f"{folder}/v") / step_time.WEIGHTS,
        }
        return {name: path.stat().st_size / 1e6 for name, path in files.items()}


def peaks(size: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Return by variant the peak memory of its steps in MB, each measured in a fresh process."""
    processes = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = tiny.save_pair(folder, hidden=size.hidden, layers=size.layers)
        for name in names:
            with processes.Pool(1) as pool:
                found[name] = pool.apply(memory.peaks, (size, pair, name))[1]
    return found


def measure(size: argparse.Namespace, with_memory: bool) -> dict[str, Any]:
    """Return what is known of one size, by variant."""
    rows: dict[str, Any] = step_time.measure(size)
    if with_memory:
        held = peaks(size, list(rows))
        for name, row in rows.items():
            row |= {"peak_mb": held[name], "peak_ratio": held[name] / held["plain SFTTrainer"]}
    return {"size": vars(size), "variants": rows, "artefacts_mb": artefacts(size)}


def table(entry: dict[str, Any]) -> str:
    """Return one size as Markdown."""
    size = entry["size"]
    lines = [f"### Hidden {size['hidden']}, r = {size['rank']}, {size['targets']}", ""]
    lines += ["| variant | CPU s per step | ratio | peak memory, ratio | preparation, s |", "|---|---|---|---|---|"]
    for name, row in entry["variants"].items():
        peak = f"{row['peak_ratio']:.3f}" if "peak_ratio" in row else "not measured"
        lines.append(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.3f} | {peak} | {row['preparation']:.1f} |")
    sizes = ", ".join(f"{name} {mb:.1f} MB" for name, mb in entry["artefacts_mb"].items())
    return "\n".join([*lines, "", f"Files: {sizes}.", ""])


def report(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything with the date, the versions and the device."""
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {name: version(name.replace("_", "-")) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "device": device,
        "load": os.getloadavg()[0],
        "sizes": found,
    }


def main() -> None:
    """Measure the grid; both files are written anew after each size, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--targets", nargs="+", default=["all-linear", "q_proj,v_proj"])
    for name, default in {"layers": 4, "length": 256, "batch": 4, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="only variants whose name holds this, beside plain SFTTrainer")
    parser.add_argument("--memory", choices=["yes", "no"], default="yes")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for RESULTS.md and results.json")
    given = vars(parser.parse_args())
    grid = product(given.pop("hidden"), given.pop("ranks"), given.pop("targets"))
    with_memory, output = given.pop("memory") == "yes", given.pop("output")
    found = []
    for hidden, rank, targets in grid:
        size = argparse.Namespace(hidden=hidden, rank=rank, targets=targets, **given)
        found.append(measure(size, with_memory))
        whole = report(found)
        (output / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
        versions = ", ".join(f"{name} {number}" for name, number in whole["versions"].items())
        head = f"# What the methods cost\n\n{whole['date']}, {whole['device']}, load {whole['load']:.1f}; {versions}. "
        head += (
            f"Random Llama models of {given['layers']} layers, {given['batch']} x {given['length']} tokens a step, "
        )
        head += f"float32, medians of {given['rounds']} rounds of CPU time. `SafeSFTTrainer(safety=None)` does what "
        head += "plain `SFTTrainer` does: how far its ratio is from 1 shows the noise. Directions of random pairs "
        head += "have full rank, which those of real ones do not. By `tests/benchmarks/cost.py`.\n\n"
        (output / "RESULTS.md").write_text(head + "\n".join(map(table, found)))


if __name__ == "__main__":
    main()
