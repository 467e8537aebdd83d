"""What each method costs over a grid of sizes, and what goes before it, written to RESULTS.md and results.json here.

    python tests/benchmarks/cost.py                                  # everything; an hour and a half on quiet cores
    python tests/benchmarks/cost.py --hidden 256 512 --ranks 8 --memory no --rest no

For each size: CPU time of a step and its ratio to plain `SFTTrainer` (medians of the rounds' own ratios, see
`step_time.py`), time to prepare, peak memory of the steps over plain `SFTTrainer` (each in a process of its own, see
`memory.py`), and how large the file is that a method needs. Then `calibration.py`, `extraction.py` and
`generation.py`. What is measured is kept at once; sizes that are not asked for stay as they were measured before.
"""

from __future__ import annotations

import argparse
import json
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

import calibration
import extraction
import generation
import memory
import step_time
from cost_table import markdown

from safe_trainer import AlignmentDirection

HERE = Path(__file__).parent
LIBRARIES = ("safe_trainer", "torch", "transformers", "trl", "peft")


def artefacts(size: argparse.Namespace) -> dict[str, float]:
    """Return by artefact how many MB its file has for the modules that are trained."""
    with tempfile.TemporaryDirectory() as folder:
        pair = step_time.save_pair(folder, size.hidden, size.layers)
        modules = None if size.targets == "all-linear" else size.targets.replace(",", "|")
        files = {
            "alignment direction": AlignmentDirection.from_checkpoints(*pair, modules=modules).save(f"{folder}/d"),
            "safety basis, inputs, rank 64": step_time.random_inputs(pair[0]).save(f"{folder}/b"),
            "security vectors, rank 8": step_time.random_vectors(pair[0]).save(f"{folder}/v") / step_time.WEIGHTS,
        }
        return {name: path.stat().st_size / 1e6 for name, path in files.items()}


def peaks(size: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Return by variant the peak memory of its steps in MB, each measured in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        pair = step_time.save_pair(folder, size.hidden, size.layers)
        return {name: memory.apart(memory.peaks, size, pair, name)[1] for name in names}


def measure(size: argparse.Namespace, with_memory: bool) -> dict[str, Any]:
    """Return what is known of one size, by variant."""
    rows: dict[str, Any] = step_time.measure(size)
    if with_memory:
        held = peaks(size, list(rows))
        for name, row in rows.items():
            row |= {"peak_mb": held[name], "peak_ratio": held[name] / held["plain SFTTrainer"]}
    return {"size": vars(size), "variants": rows, "artefacts_mb": artefacts(size)}


def rest() -> dict[str, Any]:
    """Measure what goes before training or comes after it."""
    passes = calibration.measure(calibration.parsed([]))
    return {"calibration": passes, "extraction": extraction.measure(), "generation": generation.main([])}


def measured_on() -> dict[str, Any]:
    """Return date, versions and device."""
    threads = torch.get_num_threads()
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {name: version(name.replace("_", "-")) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} thread" + "s" * (threads > 1),
        "load": round(os.getloadavg()[0], 1),
    }


def keep(whole: dict[str, Any], output: Path) -> None:
    """Write both files anew."""
    whole |= measured_on()
    (output / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (output / "RESULTS.md").write_text(markdown(whole))


def _key(entry: dict[str, Any]) -> list[Any]:
    return [entry["size"][name] for name in ("hidden", "rank", "targets", "layers", "length", "batch")]


def main() -> None:
    """Measure the grid and the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--targets", nargs="+", default=["all-linear", "q_proj,v_proj"])
    for name, default in {"layers": 1, "length": 256, "batch": 8, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--only", default="", help="only variants with such a name, a regular expression, beside plain SFTTrainer"
    )
    parser.add_argument("--memory", choices=["yes", "no"], default="yes")
    parser.add_argument("--rest", choices=["yes", "no"], default="yes", help="calibration, extraction, generation")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for RESULTS.md and results.json")
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    grid = list(product(given.pop("hidden"), given.pop("ranks"), given.pop("targets")))
    with_memory, with_rest, output = given.pop("memory") == "yes", given.pop("rest") == "yes", given.pop("output")
    known = output / "results.json"
    whole = json.loads(known.read_text()) if known.exists() else {"sizes": []}
    for hidden, rank, targets in grid:
        size = argparse.Namespace(hidden=hidden, rank=rank, targets=targets, **given)
        found = measure(size, with_memory)
        others = [entry for entry in whole["sizes"] if _key(entry) != _key(found)]
        whole["sizes"] = sorted([*others, found], key=lambda entry: list(map(str, entry["size"].values())))
        keep(whole, output)
    if with_rest:
        whole["rest"] = rest()
        keep(whole, output)


if __name__ == "__main__":
    main()
