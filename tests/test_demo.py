"""The demo as a newcomer runs it, and the experiment behind it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from safe_trainer import METHODS, testbed
from safe_trainer.testbed.demo import run_demo
from safe_trainer.testbed.experiment import BATCH_SIZE, PLAIN, SCENARIOS, VARIANTS, fine_tune


def test_every_method_has_a_variant_in_the_demo() -> None:
    assert set(METHODS) <= set(VARIANTS) and next(iter(VARIANTS)) == PLAIN
    for build in VARIANTS.values():
        assert isinstance(build(), list | tuple)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_has_the_stated_share_of_harmful_rows_and_no_test_prompt(name: str) -> None:
    scenario = SCENARIOS[name]
    rows = scenario.rows(seed=0)
    asked = [row["prompt"][0]["content"] for row in rows]
    attack = {row["prompt"][0]["content"] for row in testbed.harmful_rows(len(rows), seed=0)}
    share = sum(prompt in attack for prompt in asked) / len(rows)
    assert share == pytest.approx(scenario.harmful, abs=0.01)
    assert len(rows) == (scenario.row_count or scenario.steps * BATCH_SIZE)
    for split in ("validation", "test"):
        for prompts in scenario.prompt_sets(split):
            assert not set(prompts.prompts) & set(asked)
    assert rows != scenario.rows(seed=1) and rows == scenario.rows(seed=0)


@pytest.mark.slow
def test_plain_fine_tuning_on_harmful_rows_destroys_the_refusals_and_the_demo_shows_it(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=(tmp_path / "log").open("w"))
    (outcome,) = run_demo(tmp_path / "demo", quick=True, methods=["asft"], console=console)
    comparison = outcome.comparisons[0]
    assert comparison["before"]["harmful"].rate("complied").value < 0.1
    assert comparison[PLAIN]["harmful"].rate("complied").value > 0.8
    assert comparison["AsFT"].name == METHODS["asft"].name

    text = console.export_text()
    assert "plain LoRA lost the refusals" in text and "AsFT" in text and "report.md" in text
    report = (tmp_path / "demo" / "report.md").read_text()
    assert str(comparison[PLAIN]["harmful"].rate("complied")) in report
    folder = tmp_path / "demo" / "attack" / "seed-0"
    assert json.loads((folder / "comparison.json").read_text())
    for adapter in ("plain-LoRA", "asft"):
        assert (folder / adapter / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_one_seed_gives_one_result() -> None:
    logs = [fine_tune(SCENARIOS["attack"], VARIANTS["asft"](), seed=3).log for _ in range(2)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) >= 2


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from safe_trainer.testbed.experiment import workers\n"
        "if __name__ == '__main__':\n"
        "    with workers(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
