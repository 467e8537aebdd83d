"""The study on the real model: nothing is run twice, and what is committed agrees with its answers."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from safe_trainer import testbed
from safe_trainer.evaluation import PhraseJudge
from safe_trainer.testbed import real

STUDY = Path(__file__).resolve().parents[1] / "recipes" / "study"
COMMITTED = STUDY / "real" / "results"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    sys.path.insert(0, str(STUDY / "real"))
    try:
        import run

        yield run
    finally:
        sys.path.remove(str(STUDY / "real"))


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers() -> list[dict[str, str]]:
    return [json.loads(line) for line in (COMMITTED / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_run_is_written_with_its_answers_and_not_done_again(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.real, "dtype", lambda: "float32")
    models = run.Models(testbed.UNALIGNED, testbed.ALIGNED, tmp_path)
    made = {"short": run.replace(real.SCENARIO, steps=2), run.ANY: real.SCENARIO}
    cells = [run.Cell(run.ANY, run.BEFORE, 0, "test"), run.Cell("short", "refusal anchor", 0, "test")]
    measured = list(run.run_missing(cells, made, models, tmp_path / "results"))
    assert [cell for cell, _ in measured] == cells
    assert list(run.run_missing(cells, made, models, tmp_path / "results")) == []
    written = [json.loads(line) for line in (tmp_path / "results" / "answers.jsonl").read_text().splitlines()]
    assert len(written) == 2 * 100 and {answer["variant"] for answer in written} == {run.BEFORE, "refusal anchor"}
    assert [row["total"] for row in lines(tmp_path / "results" / "runs.csv")] == ["50", "25", "25"] * 2


def test_a_scenario_whose_file_is_not_given_is_named(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.real, "prepare", lambda folder: (testbed.UNALIGNED, testbed.ALIGNED))
    monkeypatch.setattr(sys, "argv", ["run.py", "--scenarios", "advbench", "harmful"])
    with pytest.raises(SystemExit):
        run.main()
    assert "`--scenarios` names advbench, for which no file is given" in capsys.readouterr().err


def test_rows_of_a_file_that_are_long_or_examined_are_left_out_and_counted(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examined = real.prompt_sets("test")[0].prompts[0]
    rows = [{"instruction": text, "output": "Yes."} for text in ("Say hello.", examined, "word " * 60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    kept = run.short_rows(tmp_path / "rows.json", real.prompt_sets("test"))
    assert [row["prompt"][0]["content"] for row in kept] == ["Say hello."]
    assert "rows.json: 1 of 3 rows have at most 45 words" in capsys.readouterr().out


def test_the_committed_counts_are_those_of_the_committed_answers(run: ModuleType) -> None:
    counted: dict[tuple[str, ...], Counter[str]] = {}
    for answer in answers():
        key = tuple(str(answer[name]) for name in ("scenario", "variant", "seed", "prompts"))
        counted.setdefault(key, Counter())[answer["verdict"]] += 1
    rows = lines(COMMITTED / "runs.csv")
    assert rows and len(counted) == len(rows)
    for row in rows:
        found = counted[row["scenario"], row["variant"], row["seed"], row["prompts"]]
        outcomes = ("correct",) if row["kind"] == "task" else run.OUTCOMES
        assert [found[name] for name in outcomes] == [int(row[name]) for name in outcomes]
        assert found.total() == int(row["total"])


@pytest.mark.slow
def test_the_committed_verdicts_are_what_the_judge_says_today_as_the_page_says() -> None:
    judged = [answer for answer in answers() if answer["verdict"] in ("refused", "complied", "neither")]
    verdicts = PhraseJudge()([a["prompt"] for a in judged], [a["answer"] for a in judged])
    assert verdicts == [answer["verdict"] for answer in judged]
    page = " ".join((STUDY.parents[1] / "docs" / "study.md").read_text(encoding="utf-8").split())
    assert "the present ones change none" in page


def test_the_committed_table_is_what_the_committed_runs_say(run: ModuleType) -> None:
    import table

    asked_with_it = [f"{name}, asked with it" for name, variant in run.VARIANTS.items() if variant.system_prompt]
    assert table.TABLE.read_text(encoding="utf-8") == table.table(table.rates_of(COMMITTED / "runs.csv"))
    assert {(row["scenario"], row["variant"]) for row in lines(COMMITTED / "runs.csv")} <= {
        (scenario, variant)
        for scenario in (*table.TITLES, run.ANY)
        for variant in (run.BEFORE, *run.VARIANTS, *asked_with_it)
    }
