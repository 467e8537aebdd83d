"""What `cost.py` measured, as Markdown: a table for each rank and targets, sizes side by side so that growth shows."""

from __future__ import annotations

from itertools import groupby
from typing import Any

BARS = {
    "AsFT, published": 1.03,
    "AsFT, subspace, rank 64": 1.03,
    "SaLoRA": 1.06,
    "SaLoRA, inputs, own start": 1.06,
    "Security Vectors, rank 8": 1.15,
    "Refusal anchor": 1.10,
    "Refusal anchor and Security Vectors": 1.10,
}
"""What a step may take at most, in steps of plain `SFTTrainer`."""
PEAK_BAR = 1.05


def markdown(whole: dict[str, Any]) -> str:
    """Return the whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in whole["versions"].items())
    measured = f"Last measured {whole['date']}, {whole['device']}, load {whole['load']}; {versions}."
    text = ["# What the methods cost", "", measured, ""]
    for _, entries in groupby(sorted(whole["sizes"], key=_kind), _kind):
        text += [_table(sorted(entries, key=lambda entry: entry["size"]["hidden"])), ""]
    if whole["sizes"]:
        text[4:4] = [_explanation([entry["size"] for entry in whole["sizes"]]), ""]
    if "rest" in whole:
        text += [_rest(whole["rest"])]
    return "\n".join(text)


def _kind(entry: dict[str, Any]) -> tuple[str, int, int]:
    return entry["size"]["targets"], entry["size"]["rank"], entry["size"]["length"]


def _explanation(sizes: list[dict[str, Any]]) -> str:
    size, rounds = sizes[0], sorted({size["rounds"] for size in sizes})
    return (
        f"Random Llama models with {size['layers']} layer of each width and next to no vocabulary, float32. CPU time "
        f"of a step over that of plain `SFTTrainer` (median of {' or '.join(map(str, rounds))} rounds) / peak memory "
        f"of the steps over that of plain `SFTTrainer`. Bold is what misses its bar; that of memory is {PEAK_BAR}. "
        "`SafeSFTTrainer(safety=None)` does what plain `SFTTrainer` does: how far it is from 1 is the noise. "
        "The refusal anchor has four anchors of 64 tokens a step. Alignment moved the random models as far as the "
        "embedded one, see `save_pair` in `step_time.py`. By "
        "`tests/benchmarks/cost.py`; all figures are in `results.json`."
    )


def _table(entries: list[dict[str, Any]]) -> str:
    size, widths = entries[0]["size"], [entry["size"]["hidden"] for entry in entries]
    heading = ["variant", "bar", *(f"hidden {width}" for width in widths), f"preparation at {widths[-1]}, s"]
    lines = [f"### r = {size['rank']}, {size['targets']}, {size['batch']} x {size['length']} tokens a step", ""]
    lines += ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for name in entries[0]["variants"]:
        rows = [entry["variants"].get(name) for entry in entries]
        cells = [_cell(row, BARS.get(name)) if row else "" for row in rows]
        preparation = f"{rows[-1]['preparation']:.1f}" if rows[-1] else ""
        lines.append("| " + " | ".join([name, str(BARS.get(name, "")), *cells, preparation]) + " |")
    files = "; ".join(
        f"{name} {', '.join(format(entry['artefacts_mb'][name], '.1f') for entry in entries)} MB"
        for name in entries[0]["artefacts_mb"]
    )
    return "\n".join([*lines, "", f"Files for one layer of each width: {files}."])


def _cell(row: dict[str, Any], bar: float | None) -> str:
    parts = [_figure(row["ratio"], bar)]
    if "peak_ratio" in row:
        parts.append(_figure(row["peak_ratio"], PEAK_BAR if bar else None))
    return " / ".join(parts)


def _figure(ratio: float, bar: float | None) -> str:
    return f"**{ratio:.3f}**" if bar is not None and ratio > bar + 0.0005 else f"{ratio:.3f}"


def _rest(found: dict[str, Any]) -> str:
    lines = ["### Calibration", "", "| pass over 128 rows of 128 tokens, hidden 1,024, 8 layers | CPU s | ratio |"]
    lines += ["|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {ratio:.3f} |" for name, (seconds, ratio) in found["calibration"].items()]
    taken, answered = found["extraction"], found["generation"]
    lines += ["", "### An alignment direction from a large pair", ""]
    lines += [
        f"Two bfloat16 checkpoints of {taken['checkpoint_mb']:,.0f} MB each, every linear layer: the process grew "
        f"by {taken['growth_mb']:.0f} MB at most, where the largest weight takes {taken['largest_weight_mb']:.0f} MB "
        f"in float32, in {taken['cpu_seconds']:.0f} s of CPU time; the file has {taken['file_mb']:.0f} MB."
    ]
    lines += ["", "### Answers in batches", ""]
    lines += [
        f"{answered['prompts']} prompts of {answered['prompt_tokens'][0]} to {answered['prompt_tokens'][-1]} tokens, "
        f"asked of the embedded model: {answered['batched_seconds']:.1f} s together, "
        f"{answered['one_by_one_seconds']:.1f} s one by one, {answered['times_faster']:.1f} times as long; "
        f"{answered['equal_answers']} answers are equal.",
        "",
    ]
    return "\n".join(lines)
