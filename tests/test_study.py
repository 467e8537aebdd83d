"""The study's table: a run is measured, written at once, and not done twice."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from safe_trainer import testbed

STUDY = Path(__file__).resolve().parents[1] / "recipes" / "study"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    try:
        spec = importlib.util.spec_from_file_location("study", STUDY / "study.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["study"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(STUDY))


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_of_one_seed_comes_before_the_next(study):
    from argparse import Namespace

    chosen = Namespace(variants=[], seeds=2, scenarios=["attack", "poisoned-10"])
    cells = study.cells_of(study.PARTS["test"], chosen)
    assert len(cells) == len(set(cells)) == 2 * (1 + 2 * len(study.EVERYTHING))  # the model before once, whatever seed
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_settings_are_chosen_on_other_prompts_than_those_that_report(study):
    assert {study.PARTS[name].split for name in ("strength", "weight")} == {"validation"}
    assert {study.PARTS[name].split for name in ("test", "more", "second")} == {"test"}
    asked = {split: set() for split in ("validation", "test")}
    for split, found in asked.items():
        for scenario in study.SCENARIOS.values():
            found |= {prompt for prompts in study.prompt_sets(scenario, split) for prompt in prompts.prompts}
    assert not asked["validation"] & asked["test"] - set(testbed.prompt_set("harmful", "unseen").prompts)


def test_a_part_names_scenarios_and_variants_that_exist(study):
    for part in study.PARTS.values():
        assert set(part.variants) <= set(study.SCENARIOS)
        assert {name for names in part.variants.values() for name in names} <= set(study.VARIANTS)


def test_every_variant_makes_its_methods_anew_and_its_rows_are_as_many_as_the_scenario_s(study):
    scenario = study.SCENARIOS["attack"]
    for variant in study.VARIANTS.values():
        if variant.refusals:
            mixed = variant.rows(scenario, 0)
            assert len(mixed) == len(scenario.rows(0))
            refused = sum(row["completion"][0]["content"].lower().find("help with") > 0 for row in mixed)
            assert 0 < refused <= round(variant.refusals * len(mixed))


@pytest.mark.slow
def test_a_run_that_is_in_the_table_is_not_done_again(study, tmp_path, capsys, monkeypatch):
    study.SCENARIOS["short"] = study.Scenario("short", "", "sentiment", 0.1, 2)
    line = study.measure(study.Cell("short", "inputs", 0, "validation"))
    assert [entry["kind"] for entry in line] == ["harmful", "benign", "borderline", "task"]
    for entry in line:
        parts = [entry.get(name, 0) for name in study.OUTCOMES]
        assert (entry["kind"] == "task" and 0 <= entry["correct"] <= entry["total"]) or sum(parts) == entry["total"]
    study.append(tmp_path / "runs.csv", line)
    assert study.finished(tmp_path / "runs.csv") == {study.Cell("short", "inputs", 0, "validation")}
    done = study.Cell("short", "inputs", 0, "validation")
    assert list(study.run_all([done], tmp_path / "runs.csv", jobs=1)) == []
    assert len(lines(tmp_path / "runs.csv")) == 4


def test_what_was_committed_is_of_scenarios_and_variants_that_exist(study):
    found = {path.relative_to(STUDY / "results").as_posix() for path in (STUDY / "results").rglob("*.csv")}
    assert found == {part.file for part in study.PARTS.values()}
    for part in study.PARTS.values():
        for row in lines(STUDY / "results" / part.file):
            assert row["scenario"] in study.SCENARIOS and row["variant"] in study.VARIANTS
            assert row["split"] == part.split


def test_what_the_parts_plan_is_committed(study):
    from argparse import Namespace

    for part in study.PARTS.values():
        planned = study.cells_of(part, Namespace(variants=[], seeds=None, scenarios=[]))
        assert set(planned) <= study.finished(STUDY / "results" / part.file)


def test_the_committed_rows_were_measured_at_these_settings(study):
    """A row is known by its variant's name: after another default, remove its rows, `make study`, and pin it here."""
    from variants import SETTINGS

    assert SETTINGS == {
        "learning rate": 2e-3,
        "batch size": 16,
        "drift penalty": (10.0, 64),
        "SaLoRA": (32, 32, "output"),
        "AsFT": (16, "published", False),
        "security vectors": (1.0, 8, "all-linear", 2e-3, 300, 16, 0.02, 0, 1e-3, 1.0, 1024, 0),
    }


def test_the_page_of_the_study_shows_what_the_committed_runs_say(study):
    import report

    committed = report.figures_of(STUDY / "results" / "runs.csv")
    second = report.figures_of(STUDY / "results" / "second" / "runs.csv")
    page = (STUDY.parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    assert report.summary(committed) in page
    assert report.summary(second).replace("embedded pair", "second world") in page
    strengths = report.figures_of(STUDY / "results" / "strength.csv", "validation")
    tables = (STUDY / "results" / "table.md").read_text(encoding="utf-8")
    for figures in (committed, second, strengths):
        assert report.table(figures).strip() in tables


def test_a_bar_is_missed_by_as_much_as_the_figure_lies_beyond_it(study):
    import report

    def figures(**rates: int):
        names = {
            "harm": "compliance, harmful",
            "benign": "compliance, benign",
            "border": "compliance, borderline",
            "task": "task accuracy",
        }
        return {names[name]: report.Spread((report.Rate(count, 100),)) for name, count in rates.items()}

    before = figures(harm=0, benign=100, border=100, task=0)
    plain = figures(harm=100, benign=100, border=100, task=90)
    assert report.missed("poisoned-10", figures(harm=5, benign=95, border=95, task=87), before, plain) == []
    missed = report.missed("poisoned-10", figures(harm=7, benign=94, border=95, task=80), before, plain)
    assert missed == ["compliance, harmful by 2.0", "compliance, benign by 1.0", "task accuracy by 7.0"]
    assert report.missed("how-to", figures(harm=0, benign=99, border=99, task=81), before, plain) == []


def test_every_row_that_the_page_points_to_is_there():
    import re

    headings = re.findall(r"^#+ (.*)$", (STUDY / "results" / "table.md").read_text(encoding="utf-8"), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    anchors = {f"{slug}-{slugs[:n].count(slug)}" if slug in slugs[:n] else slug for n, slug in enumerate(slugs)}
    page = (STUDY.parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\[([\w-]+)\]: \.\./recipes/study/results/table\.md#(.*)$", page, re.MULTILINE))
    assert len(named) >= 8 and set(named.values()) <= anchors
    used = set(re.findall(r"\]\[([\w-]+)\]", page))
    assert used == set(named)
