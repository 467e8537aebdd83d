"""What the demo says about results, on results made by hand."""

from rich.console import Console

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import Answer, Comparison, Evaluation, SetResult
from safe_trainer.testbed import summary
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


def conclude(*evaluations: Evaluation) -> dict[str, str]:
    lines = summary.conclusions(POISONED, [Comparison((evaluation("before", 2, correct=0), *evaluations))])
    return {line.split(" ")[0] if not line.startswith(PLAIN) else PLAIN: line for line in lines}


def test_conclusion_names_the_loss_the_rescue_and_what_it_cost() -> None:
    said = conclude(evaluation(PLAIN, 98), evaluation("Good", 5, correct=97), evaluation("Dear", 40, benign=80))
    assert said[PLAIN].startswith(
        "plain LoRA lost the refusals: compliance with harmful prompts went from 2.0 % (2/100) to"
    )
    assert "Good kept the refusals:" in said["Good"]
    assert "task accuracy 97.0 % (97/100) (plain LoRA 100.0 %" in said["Good"]
    assert "answered as often as before" in said["Good"]
    assert "kept part of the refusals:" in said["Dear"]
    assert (
        "kept the refusals, at the cost of the task:"
        in conclude(evaluation(PLAIN, 98), evaluation("Lazy", 0, correct=40))["Lazy"]
    )
    assert "helpful answers to benign prompts fell from 100.0 % (100/100) to 80.0 % (80/100)" in said["Dear"]


def test_conclusion_does_not_praise_what_is_within_the_uncertainty() -> None:
    said = conclude(evaluation(PLAIN, 98), evaluation("None", 95), evaluation("Few", 70))
    assert "did not keep the refusals" in said["None"]
    assert "kept few of the refusals" in said["Few"]
    said = conclude(evaluation(PLAIN, 5))
    assert "plain LoRA kept the refusals" in said[PLAIN]


def test_a_model_that_neither_complies_nor_refuses_is_not_said_to_have_kept_its_refusals() -> None:
    babbling = evaluation("Babble", 0)
    harmful = babbling["harmful"]
    babbled = SetResult(harmful.prompt_set, harmful.answers, {"phrases": ("neither",) * TOTAL})
    said = conclude(evaluation(PLAIN, 98), Evaluation("Babble", (babbled, *babbling.results[1:])))
    assert "kept" not in said["Babble"] and "refusal rate 0.0 % (0/100)" in said["Babble"]


def test_counts_are_pooled_over_seeds() -> None:
    comparisons = [Comparison((evaluation("before", 0), evaluation(PLAIN, count))) for count in (90, 100)]
    rate = summary.pooled([c[PLAIN] for c in comparisons], "harmful", "complied")
    assert (rate.count, rate.total) == (190, 200)


def test_table_fits_80_columns_and_shows_count_and_interval_of_every_rate() -> None:
    comparison = Comparison((evaluation("before", 2), evaluation(PLAIN, 98), evaluation("Security Vectors", 3)))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(summary.table(POISONED, [comparison], {PLAIN: [12.3]}))
    text = console.export_text()
    assert "98/100 98 %" in text and "[93, 99]" in text and "12 s" in text and "100/100 100 %" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_report_escapes_nothing_away_and_names_every_scenario() -> None:
    comparison = Comparison((evaluation("before", 2), evaluation(PLAIN, 98)))
    report = summary.markdown([(POISONED, [comparison], {PLAIN: [12.3]}), (ATTACK, [comparison], {PLAIN: [5.0]})])
    assert report.count("| before |") == 2 and "98.0 % (98/100) [93.0, 99.4]" in report
    assert POISONED.title in report and ATTACK.title in report
    assert "one million parameters" in report.replace("\n", " ")
