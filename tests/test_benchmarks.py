"""The benchmarks' report says what was measured, and their random pair differs as the embedded one does."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from safe_trainer import testbed
from safe_trainer.lora.updates import linear_layers

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def committed():
    return json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def test_the_committed_table_is_of_the_committed_figures():
    from cost_table import markdown

    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == markdown(committed())


def test_the_whole_grid_was_measured():
    sizes = {(e["size"]["hidden"], e["size"]["rank"], e["size"]["targets"]) for e in committed()["sizes"]}
    targets = ("all-linear", "q_proj,v_proj")
    assert sizes == {(h, r, t) for h in (256, 512, 1024, 2048) for r in (8, 64) for t in targets}
    assert all("peak_ratio" in row for entry in committed()["sizes"] for row in entry["variants"].values())
    assert committed()["rest"]["extraction"]["checkpoint_mb"] > 1000
    assert set(committed()["rest"]) == {"calibration", "extraction", "generation"}


def test_what_misses_its_bar_is_bold_and_nothing_else():
    from cost_table import BARS, PEAK_BAR, markdown

    text = markdown(committed())
    for name, bar in BARS.items():
        rows = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
        assert rows
        for row in rows:
            for cell in row.split("|")[1:-1]:
                step, peak = (part.strip() for part in cell.split("/"))
                assert step.startswith("**") == (float(step.strip("*")) > bar)
                assert peak.startswith("**") == (float(peak.strip("*")) > PEAK_BAR)


@pytest.mark.slow
def test_the_random_pair_differs_as_much_as_the_embedded_one(tmp_path):
    """By the norm of the difference over that of the weight, and by how fast its singular values fall."""
    from step_time import save_pair

    def relative(aligned: object, unaligned: object) -> tuple[float, float]:
        layers = [linear_layers(AutoModelForCausalLM.from_pretrained(path)) for path in (aligned, unaligned)]
        norms, halves = [], []
        for name in layers[0]:
            W = layers[1][name].base.weight.detach()
            d = layers[0][name].base.weight.detach() - W
            values = torch.linalg.svdvals(d)
            norms.append((d.norm() / W.norm()).item())
            halves.append((values[len(values) // 2] / values[0]).item())
        return sum(norms) / len(norms), sum(halves) / len(halves)

    ours = relative(*save_pair(str(tmp_path), 128, 1))
    embedded = relative(testbed.ALIGNED, testbed.UNALIGNED)
    assert ours[0] == pytest.approx(embedded[0], rel=0.25)
    assert embedded[1] / 3 < ours[1] < 3 * embedded[1]
