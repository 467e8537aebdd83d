"""What the demo says about results, on results made by hand."""

from rich.console import Console

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import Answer, Comparison, Evaluation, SetResult
from safe_trainer.testbed.demo import Outcome, conclusions, markdown, pooled, table
from safe_trainer.testbed.experiment import PLAIN, SCENARIOS

TOTAL = 100
POISONED, ATTACK = SCENARIOS["poisoned"], SCENARIOS["attack"]


def evaluation(name: str, harmful: int, benign: int = TOTAL, correct: int = TOTAL) -> Evaluation:
    """An evaluation in which so many harmful and benign prompts are answered and so many task answers are right."""
    results = []
    for kind, answered in (("harmful", harmful), ("benign", benign), ("borderline", TOTAL)):
        verdicts = ("complied",) * answered + ("refused",) * (TOTAL - answered)
        asked = PromptSet(kind, kind, tuple(f"{kind} {i}" for i in range(TOTAL)))
        results.append(SetResult(asked, (Answer("…"),) * TOTAL, {"phrases": verdicts}))
    asked = PromptSet("sentiment", "task", tuple(map(str, range(TOTAL))), references=("yes",) * TOTAL)
    graded = ("correct",) * correct + ("wrong",) * (TOTAL - correct)
    results.append(SetResult(asked, (Answer("…"),) * TOTAL, {"exact match": graded}))
    return Evaluation(name, tuple(results))


def test_conclusion_is_the_verdict_of_the_comparison_for_each_seed() -> None:
    runs = [Comparison((evaluation("before", 2), evaluation(PLAIN, 98), evaluation("Good", n))) for n in (2, 40)]
    (lost, kept) = conclusions(Outcome(POISONED, runs[:1]))
    assert lost.startswith(f"{PLAIN}: Safety was eroded") and "98.0 % (98/100)" in lost
    assert kept == f"Good: {runs[0].verdict('Good').headline}"
    assert [line.partition(":")[0] for line in conclusions(Outcome(POISONED, runs))] == [
        f"{name}, seed {seed}" for name in (PLAIN, "Good") for seed in (0, 1)
    ]


def test_counts_are_pooled_over_seeds() -> None:
    comparisons = [Comparison((evaluation("before", 0), evaluation(PLAIN, count))) for count in (90, 100)]
    rate = pooled([c[PLAIN] for c in comparisons], "harmful", "complied")
    assert (rate.count, rate.total) == (190, 200)


def test_table_fits_80_columns_and_shows_count_and_interval_of_every_rate() -> None:
    comparison = Comparison((evaluation("before", 2), evaluation(PLAIN, 98), evaluation("Security Vectors", 3)))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(table(Outcome(POISONED, [comparison], {PLAIN: [12.3]})))
    text = console.export_text()
    assert "98/100 98 %" in text and "[93, 99]" in text and "12 s" in text and "100/100 100 %" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_report_escapes_nothing_away_and_names_every_scenario() -> None:
    comparison = Comparison((evaluation("before", 2), evaluation(PLAIN, 98)))
    outcomes = [Outcome(s, [comparison], {PLAIN: [12.3]}) for s in (POISONED, ATTACK)]
    report = markdown(outcomes)
    assert report.count(f"| before | {PLAIN} |") == 2 and "98.0 % (98/100) [93.0, 99.4]" in report
    assert f"{PLAIN} 12 s" in report and "`poisoned/seed-0/comparison.html`" in report
    assert POISONED.title in report and ATTACK.title in report
    assert "one million parameters" in report.replace("\n", " ")
