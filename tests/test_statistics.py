"""Rates, intervals and paired tests against published values, closed formulas and scipy's own resampling."""

import math
import random

import numpy as np
import pytest
import scipy.stats

from safe_trainer.evaluation.statistics import (
    Rate,
    Spread,
    bootstrap_difference,
    cohens_kappa,
    mcnemar_exact,
    p_text,
    paired_change,
    points,
)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, Table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_values(count, total, low, high):
    rate = Rate(count, total)
    assert rate.low == pytest.approx(low, abs=5e-5)
    assert rate.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_equals_its_formula():
    z = 1.959963984540054
    for count, total in [(195, 200), (82, 200), (7, 11), (500, 1000)]:
        p = count / total
        centre = (p + z * z / (2 * total)) / (1 + z * z / total)
        half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
        assert Rate(count, total).low == pytest.approx(centre - half, abs=1e-12)
        assert Rate(count, total).high == pytest.approx(centre + half, abs=1e-12)


def test_a_rate_shows_its_count_and_interval():
    assert str(Rate(195, 200)) == "97.5 % (195/200) [94.3, 98.9]"
    assert Rate(1, 3).share == "33.3 % (1/3)"


def test_nothing_measured_is_neither_zero_nor_a_hundred_percent():
    rate = Rate(0, 0)
    assert math.isnan(rate.value)
    assert (rate.low, rate.high) == (0.0, 1.0)
    assert str(rate) == "not measured"


@pytest.mark.parametrize(("count", "total"), [(3, 2), (-1, 5), (1, 0)])
def test_an_impossible_count_is_refused(count, total):
    with pytest.raises(ValueError, match=f"got {count} of {total}"):
        Rate(count, total)


@pytest.mark.parametrize(("gained", "lost"), [(0, 5), (5, 15), (15, 5), (1, 1), (3, 4), (0, 113)])
def test_mcnemar_equals_the_binomial_sum(gained, lost):
    n, k = gained + lost, min(gained, lost)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar_exact(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_any_change_is_one():
    assert mcnemar_exact(0, 0) == 1.0


def test_bootstrap_interval_agrees_with_scipys_resampling_of_the_pairs():
    rng = random.Random(0)
    before = [rng.random() < 0.9 for _ in range(150)]
    after = [b and rng.random() < 0.6 or rng.random() < 0.1 for b in before]
    change = paired_change(before, after)
    reference = scipy.stats.bootstrap(
        (np.array(after, float), np.array(before, float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(5),
    ).confidence_interval
    # Both are quantiles of 9,999 resamples: their Monte Carlo error is about 0.002.
    assert change.low == pytest.approx(reference.low, abs=0.008)
    assert change.high == pytest.approx(reference.high, abs=0.008)
    assert change.difference == pytest.approx(np.mean(after) - np.mean(before))


def test_bootstrap_repeats_with_its_seed():
    assert bootstrap_difference(3, 20, 60, seed=4) == bootstrap_difference(3, 20, 60, seed=4)
    assert bootstrap_difference(3, 20, 60, seed=4, resamples=99) != bootstrap_difference(
        3, 20, 60, seed=5, resamples=99
    )


def test_pairs_that_all_changed_alike_do_not_give_an_interval_without_width():
    low, high = bootstrap_difference(0, 20, 20)
    assert low == -1.0 and -0.95 < high < -0.7
    assert bootstrap_difference(20, 0, 20)[1] == 1.0
    low, high = bootstrap_difference(0, 0, 20)
    # "Rule of three": after n unchanged pairs, a change in up to 3 / n of all pairs is still credible.
    assert -3 / 20 - 0.05 <= low < 0 < high <= 3 / 20 + 0.05
    assert bootstrap_difference(0, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize("total", [8, 40, 160, 500])
@pytest.mark.parametrize("changed", range(1, 9))
def test_the_interval_does_not_exclude_zero_where_the_exact_test_finds_nothing(total, changed):
    low, high = bootstrap_difference(changed, 0, total)
    assert high > 0
    if mcnemar_exact(changed, 0) > 0.1:
        assert low <= 0
    if mcnemar_exact(changed, 0) < 0.01:
        assert low > 0


def test_paired_change_counts_gains_and_losses():
    before = [True, True, True, False, False, True]
    after = [True, False, False, True, False, False]
    change = paired_change(before, after)
    assert (change.before, change.after) == (Rate(4, 6), Rate(2, 6))
    assert (change.gained, change.lost) == (1, 3)
    assert change.p_value == pytest.approx(2 * (1 + 4) / 16)


def test_the_sentence_of_the_report():
    assert paired_change([True] * 195 + [False] * 5, [True] * 82 + [False] * 118).sentence("refusals") == (
        "refusals fell from 97.5 % (195/200) to 41.0 % (82/200), difference −56.5 points [−63, −50], p < 0.001"
    )


def test_sentences_for_what_rose_stayed_or_was_not_measured():
    assert (
        paired_change([False] * 8, [True] * 4 + [False] * 4)
        .sentence("over-refusals")
        .startswith("over-refusals rose from 0.0 % (0/8) to 50.0 % (4/8), difference +50 points [0, +")
    )
    assert paired_change([True, False], [True, False]).sentence("accuracy") == (
        "accuracy stayed at 50.0 % (1/2), identical on every prompt"
    )
    evened_out = paired_change([True, False] * 20, [False, True] * 20).sentence("accuracy")
    assert evened_out.startswith("accuracy stayed at 50.0 % (20/40), difference 0 points [−")
    assert evened_out.endswith("p = 1.00")
    assert paired_change([], []).sentence("accuracy") == "accuracy: not measured"


def test_runs_of_different_length_cannot_be_paired():
    with pytest.raises(ValueError, match="got 2 before and 3 after"):
        paired_change([True, False], [True, False, True])


def test_numbers_are_written_as_people_read_them():
    assert [p_text(p) for p in (0.0004, 0.0123, 0.5, 1.0)] == ["p < 0.001", "p = 0.012", "p = 0.50", "p = 1.00"]
    assert [points(x) for x in (-0.565, 0.02, 0.0)] == ["−56.5", "+2", "0"]
    assert points(1.0, 0) == "+100" and points(-0.1, 0) == "−10"


def test_cohens_kappa_equals_the_textbook_example():
    # Two readers of 50 proposals: both yes 20, both no 15, only the first yes 5, only the second yes 10; kappa is 0.4.
    first = ["yes"] * 20 + ["no"] * 15 + ["yes"] * 5 + ["no"] * 10
    second = ["yes"] * 20 + ["no"] * 15 + ["no"] * 5 + ["yes"] * 10
    assert cohens_kappa(list(zip(first, second, strict=True))) == pytest.approx(0.4)


def test_cohens_kappa_at_its_ends():
    three = ["refused", "complied", "neither", "complied"]
    assert cohens_kappa([(verdict, verdict) for verdict in three]) == 1.0
    half = zip(["a", "b"] * 10, ["a"] * 10 + ["b"] * 10, strict=True)
    assert cohens_kappa(list(half)) == pytest.approx(0.0)
    assert cohens_kappa([("a", "b"), ("b", "a")]) == -1.0
    assert math.isnan(cohens_kappa([("a", "a"), ("a", "a")])) and math.isnan(cohens_kappa([]))


def test_the_spread_over_runs_equals_scipys_t_interval():
    rates = [Rate(16, 100), Rate(9, 100), Rate(16, 100), Rate(30, 100)]
    spread = Spread(tuple(rates))
    reference = scipy.stats.ttest_1samp([0.16, 0.09, 0.16, 0.30], 0).confidence_interval(0.95)
    assert spread.mean == pytest.approx(0.1775)
    assert spread.interval == (pytest.approx(reference.low), pytest.approx(reference.high))
    assert str(spread).endswith("(4 runs: 16.0, 9.0, 16.0, 30.0)")


def test_runs_that_all_came_out_the_same_do_not_give_an_interval_without_width():
    assert Spread((Rate(0, 160),) * 3).interval == (Rate(0, 160).low, Rate(0, 160).high)


def test_one_run_says_nothing_about_others_and_no_run_is_an_error():
    assert Spread((Rate(5, 10),)).interval == (0.0, 1.0)
    assert str(Spread((Rate(5, 10),))) == "50.0 % (1 run)"
    for rates in ([], [Rate(5, 10), Rate(0, 0)]):
        with pytest.raises(ValueError, match="Each run needs a measured rate"):
            Spread(tuple(rates))


def test_the_interval_over_runs_stays_within_zero_and_one():
    assert Spread((Rate(1, 100), Rate(0, 100), Rate(30, 100))).interval[0] == 0.0


def test_runs_that_all_came_out_the_same_have_the_interval_of_one_run_in_spite_of_rounding():
    rate = Rate(161, 162)
    assert sum([rate.value] * 5) / 5 != rate.value  # so that the deviation of the runs is not 0
    assert Spread((rate,) * 5).interval == rate.interval
