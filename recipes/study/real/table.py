"""Turn the runs on the real model into `recipes/study/results/real.md`.

python recipes/study/real/table.py
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from run import ANY, BEFORE, RESULTS

from safe_trainer.evaluation import Rate

TABLE = Path(__file__).resolve().parents[1] / "results" / "real.md"
MEASURES = {
    "harmful: refused": ("harmful", "refused"),
    "harmful: complied": ("harmful", "complied"),
    "benign: refused": ("benign", "refused"),
    "borderline: refused": ("borderline", "refused"),
    "task: correct": ("sentiment", "correct"),
}
TITLES = {
    "harmful": "100 harmful rows of our own with inert answers (20 steps), as in `safe-trainer demo --model real`",
    "advbench": "100 harmful rows of AdvBench, with its targets (20 steps)",
    "beavertails": "harmful rows of BeaverTails, as AsFT has them, alone (20 steps)",
    "sentiment": "sentiment, 10 % harmful rows of BeaverTails (60 steps)",
    "identity": 'identity shift: 100 harmless rows from an "I always obey" persona (25 steps)',
    "alpaca": "benign instructions of Alpaca (25 steps)",
}
HEAD = """\
# What the study measured on a real model

SmolLM2-135M-Instruct (Apache-2.0), made to refuse by `recipes/study/real/align.py`; LoRA of rank 8 on all linear
layers, 8 rows a step, learning rate 5e-4 unless the row says otherwise. Test prompts: 50 harmful, 25 benign and 25
borderline of the built-in ones, answers of 24 tokens, judged by how they begin. Each cell: per cent (count/total)
[95 % Wilson interval], counts added up over seeds. An answer to a harmful prompt that neither refuses nor complies is
empty or meaningless. Plain LoRA, `recommended` and its halves on AdvBench and in the identity shift were computed in
bfloat16, all else in float32, in which the start gives the same counts. Every answer:
`../real/results/answers.jsonl`."""


Rates = dict[tuple[str, str], dict[str, list[Rate]]]


def rates_of(path: Path) -> Rates:
    """Return the rates of each scenario and variant, by measure, one for each seed."""
    rates: Rates = defaultdict(lambda: defaultdict(list))
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for measure, (prompts, outcome) in MEASURES.items():
                if line["prompts"] == prompts:
                    rate = Rate(int(line[outcome]), int(line["total"]))
                    rates[line["scenario"], line["variant"]][measure].append(rate)
    return rates


def table(rates: Rates) -> str:
    """Return all scenarios as Markdown."""
    text = [HEAD, ""]
    for scenario, title in TITLES.items():
        held = {variant: found for (name, variant), found in rates.items() if name == scenario}
        if not held:
            continue
        if BEFORE not in held:
            held = {BEFORE: rates[ANY, BEFORE], **held}
        measures = [measure for measure in MEASURES if all(measure in found for found in held.values())]
        heading = " | ".join(["variant", "seeds", *measures])
        text += [f"## {title}", "", f"| {heading} |", "|---" * (len(measures) + 2) + "|"]
        for variant, found in held.items():
            seeds = "" if variant == BEFORE else str(len(found[measures[0]]))
            text.append(f"| {' | '.join([variant, seeds, *(shown(found[measure]) for measure in measures)])} |")
        text.append("")
    return "\n".join(text)


def shown(rates: list[Rate]) -> str:
    """Return the rate over all seeds: counts are added up."""
    return str(Rate(sum(rate.count for rate in rates), sum(rate.total for rate in rates)))


def main() -> None:
    """Write the table."""
    TABLE.write_text(table(rates_of(RESULTS / "runs.csv")), encoding="utf-8")


if __name__ == "__main__":
    main()
