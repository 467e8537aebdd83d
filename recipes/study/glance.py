"""Keep the table "What each needs and stops" of `docs/methods.md` as the committed runs have it.

python recipes/study/glance.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from report import Figures, figures_of, shown
from study import RESULTS

from safe_trainer.evaluation import Rate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
REAL = Path(__file__).parent / "real" / "results" / "runs.csv"
BEGIN, END = "<!-- by recipes/study/glance.py -->\n\n", "\n\n<!-- end -->"
NOT_MEASURED = "not measured"
TOY = {"attack": "100 harmful rows", "poisoned-10": "10 % harmful", "how-to": "how-to answers", "obedient": "identity"}
REAL_SCENARIOS = {"advbench": "100 harmful rows", "identity": "identity"}
GUARDSPACE = "inputs, 99 % of the variance, GuardSpace's start"
METHODS = {
    "`recommended`": ("recommended", "nothing", "no", "1.09 / 1.02, and a fit"),
    "`SecurityVectors`": ("security vectors", "100 harmful rows", "no", "1.02 / 1.00, and a fit"),
    "`RefusalAnchor`": ("refusal anchor", "nothing", "no", "1.02 / 1.02"),
    "`ConstrainedSFT`": ("Constrained SFT", "nothing", "no", "1.47 / 1.18"),
    "`SafeGrad`": ("SafeGrad", "nothing", "no", "1.08 / 1.02"),
    "`AsFT`, weight 10": ("AsFT", "nothing", "before alignment", "0.97 / 1.06"),
    "`SaLoRA`": ("SaLoRA", "100 refusals", "no", "0.98 / 1.02"),
    "GuardSpace, in `SaLoRA`": (GUARDSPACE, "100 harmful prompts", "no", "0.99 / 1.05"),
    "Safe LoRA, afterwards": ("Safe LoRA", "nothing", "before alignment", "no steps"),
    "a quarter or fifth of the learning rate": (("plain LoRA, lr 5e-4", "plain LoRA, lr 1e-4"), "nothing", "no", "1"),
    "10 % refusals mixed in": ("plain LoRA, 10 % refusals mixed in", "refusals", "no", "1"),
    "averaged weights": (("plain LoRA, averaged", "plain LoRA, averaged (0.9)"), "nothing", "no", "0.93 / 1.00"),
    "plain LoRA": ("plain LoRA", "nothing", "no", "1"),
}
"""Variant in the tables (toy, real), data, second model, time and memory of a step against plain LoRA."""


def real_rates(path: Path = REAL) -> dict[tuple[str, str], tuple[Rate, Rate]]:
    """Return, of each scenario and variant on the real model, harmful compliance and harmless refusals, all seeds."""
    found: dict[tuple[str, str], tuple[Rate, Rate]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["kind"] == "task":
                continue
            cell, harmful = (line["scenario"], line["variant"]), line["kind"] == "harmful"
            pair = list(found.get(cell, (Rate(0, 0), Rate(0, 0))))
            count = int(line["complied" if harmful else "refused"])
            old = pair[not harmful]
            pair[not harmful] = Rate(old.count + count, old.total + int(line["total"]))
            found[cell] = (pair[0], pair[1])
    return found


def toy_cell(found: Figures | None) -> str:
    """Return compliance with harmful prompts, and what is kept of benign prompts and of the task if there is one."""
    if found is None:
        return NOT_MEASURED
    task = f", task {100 * found['task accuracy'].mean:.0f}" if "task accuracy" in found else ""
    return f"{shown(found['compliance, harmful'])}; benign {100 * found['compliance, benign'].mean:.0f}{task}"


def real_cell(found: tuple[Rate, Rate] | None) -> str:
    """Return compliance with harmful prompts, and refusals of harmless ones."""
    if found is None:
        return NOT_MEASURED
    harm, refused = found
    low, high = harm.interval
    return f"{harm.count}/{harm.total} [{100 * low:.0f}, {100 * high:.0f}]; refuses {refused.count}/{refused.total}"


def table() -> str:
    """Return the table as Markdown."""
    toy, real = figures_of(RESULTS / "runs.csv"), real_rates()
    heads = ["method", "data", "second model", "time / memory of a step"]
    heads += [f"toy: {title}" for title in TOY.values()] + [f"real: {title}" for title in REAL_SCENARIOS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for title, (variants, *needs) in METHODS.items():
        on_toy, on_real = variants if isinstance(variants, tuple) else (variants, variants)
        cells = [toy_cell(toy.get((scenario, on_toy))) for scenario in TOY]
        cells += [real_cell(real.get((scenario, on_real))) for scenario in REAL_SCENARIOS]
        lines.append("| " + " | ".join([title, *needs, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:start] + table() + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
