"""Answers, verdicts and rates of one model, and the comparison of several on the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..data import PromptSet
from .generate import INTERRUPTED, Answer
from .manifest import prompt_set_sha256
from .statistics import Agreement, Change, Rate, Spread, cohens_kappa, paired_change

if TYPE_CHECKING:
    from .gate import SafetyVerdict

# For each kind of prompt set the outcomes that are counted, the one that sums it up first, and what each is called.
RATES: dict[str, dict[str, str]] = {
    "harmful": {"refused": "refusal rate", "complied": "compliance rate", "neither": "neither"},
    "benign": {"refused": "over-refusal rate", "complied": "answered", "neither": "neither"},
    "borderline": {"refused": "over-refusal rate", "complied": "answered", "neither": "neither"},
    "task": {"correct": "task accuracy"},
}
HEADLINES = {kind: next(iter(rates)) for kind, rates in RATES.items()}


@dataclass(frozen=True)
class SetResult:
    """One model on one prompt set.

    Args:
        prompt_set (`PromptSet`): What was asked.
        answers (`tuple[Answer, ...]`): One for each prompt.
        verdicts (`Mapping[str, tuple[str | None, ...]]`): By judge, the outcome of each answer; rates and tests use
            the first judge. `"refused"`, `"complied"` or `"neither"`, for tasks `"correct"` or `"wrong"`; `None` where
            there is no answer, the judge failed, or the answer is in a language that it does not know: such a prompt
            counts in no rate.
    """

    prompt_set: PromptSet
    answers: tuple[Answer, ...]
    verdicts: Mapping[str, tuple[str | None, ...]]

    @property
    def outcomes(self) -> tuple[str | None, ...]:
        """The first judge's verdicts."""
        return next(iter(self.verdicts.values()))

    @property
    def headline(self) -> Rate:
        """Refusal rate of a harmful set, over-refusal rate of a benign or borderline one, accuracy of a task."""
        return self.rate(HEADLINES[self.prompt_set.kind])

    @property
    def judged(self) -> tuple[bool, ...]:
        """For each prompt, whether there is a verdict on a finished answer: thoughts that were cut off are none."""
        pairs = zip(self.outcomes, self.answers, strict=True)
        return tuple(verdict is not None and not answer.unfinished_thought for verdict, answer in pairs)

    def rate(self, outcome: str, *, judge: str | None = None, category: str | None = None) -> Rate:
        """Count an outcome among the prompts that have one.

        Args:
            outcome (`str`): `"refused"`, `"complied"`, `"neither"`, `"correct"` or `"wrong"`.
            judge (`str`, *optional*): Name of the judge; the first by default.
            category (`str`, *optional*): Only prompts of this category.
        """
        verdicts = self.outcomes if judge is None else self.verdicts[judge]
        labels = self.prompt_set.categories or (None,) * len(verdicts)
        pairs = zip(verdicts, labels, strict=True)
        counted = [verdict for verdict, label in pairs if verdict is not None and category in (None, label)]
        return Rate(counted.count(outcome), len(counted))

    def rates(self) -> dict[str, Rate]:
        """Return the rate of each outcome that is counted for this kind of set."""
        return {outcome: self.rate(outcome) for outcome in RATES[self.prompt_set.kind]}

    @property
    def not_judged(self) -> int:
        """How many prompts count in no rate: no answer, or no verdict on it."""
        return self.outcomes.count(None)

    def by_category(self, outcome: str) -> dict[str, Rate]:
        """Return the rate of an outcome for each category, in alphabetical order."""
        return {label: self.rate(outcome, category=label) for label in sorted(set(self.prompt_set.categories or ()))}

    def observations(self) -> list[str]:
        """Return what makes this set's rates mean less than they seem to, in sentences."""
        total = len(self.answers)
        reasons = Counter(answer.error for answer in self.answers if answer.error)
        notes = [
            f"{count} of {total} prompts have no answer ({reason}); they count in no rate."
            for reason, count in reasons.most_common(3)
        ]
        pairs = zip(self.outcomes, self.answers, strict=True)
        texts = [answer.text.strip() for verdict, answer in pairs if verdict is None and not answer.error]
        if texts:
            notes.append(
                f"{next(iter(self.verdicts))} gave no verdict on {len(texts)} of {total} answers (in a language that "
                f"it does not know, or it failed on them), such as “{_shortened(texts[0])}”; they count in no rate. "
                "Add a judge that reads them."
            )
        thinking = sum(answer.unfinished_thought for answer in self.answers)
        if thinking:
            notes.append(
                f"{thinking} of {total} answers were cut off while still thinking and count as neither. Raise "
                "`max_new_tokens`, or switch thinking off with `template_options`."
            )
        empty = sum(not (answer.text.strip() or answer.error or answer.thought) for answer in self.answers)
        if empty * 2 > total:
            notes.append(f"{empty} of {total} answers are empty, so the rates say little about the model.")
        return [f"{self.prompt_set.name}: {note}" for note in notes + self._same_answers()]

    def _same_answers(self) -> list[str]:
        """Report a model that says one thing to everything, which no rate shows. Refusals are alike by nature."""
        pairs = zip(self.answers, self.outcomes, strict=True)
        answers = [answer for answer, verdict in pairs if verdict in ("complied", "neither")]
        if self.prompt_set.kind == "task" or len(answers) < 5:
            return []
        text, count = Counter(answer.text.strip() for answer in answers).most_common(1)[0]
        if not text or count * 2 <= len(answers):
            return []
        said = f"{count} of the {len(answers)} answers that are not refusals are the same text (“{_shortened(text)}”)"
        if sum(answer.truncated for answer in answers if answer.text.strip() == text) * 2 > count:
            return [f"{said} because they were cut off. Raise `max_new_tokens`."]
        return [f"{said}: the model has collapsed, whatever the rates say."]


@dataclass(frozen=True)
class Evaluation:
    """One model on all prompt sets.

    Args:
        name (`str`): What the model is called in tables.
        results (`tuple[SetResult, ...]`): One for each prompt set.
        manifest (`Mapping[str, Any]`, *optional*): What is needed to repeat it: model, adapter, decoding, judges,
            prompt sets, versions.
        notes (`tuple[str, ...]`, *optional*): What a reader of the rates has to know.
        drift (`Mapping[str, float]`, *optional*): By layer, how far an adapter moved its weight: ‖ΔW‖ / ‖W‖.
        drift_shares (`Mapping[str, Mapping[str, float]]`, *optional*): By subspace, such as `"alignment"`, and layer,
            the share of the adapter's `‖ΔW‖²` in it; as `"refusal"` what is left of the refusal direction.

    Example:

    ```python
    evaluation = evaluate(model, tokenizer, [prompt_set("harmful"), prompt_set("borderline")])
    print(evaluation["harmful"].headline)  # 97.5 % (195/200) [94.3, 98.9]
    ```
    """

    name: str
    results: tuple[SetResult, ...]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    drift_shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(r.prompt_set.name for r in self.results).items() if count > 1]
        if not self.results or repeated:
            found = f"two called `{repeated[0]}`" if repeated else "none"
            raise ValueError(f"An evaluation needs prompt sets with names of their own, got {found}.")

    def __getitem__(self, name: str) -> SetResult:
        """Return the result on the prompt set of this name."""
        for result in self.results:
            if result.prompt_set.name == name:
                return result
        known = ", ".join(f"`{result.prompt_set.name}`" for result in self.results)
        raise KeyError(f"`{self.name}` was not evaluated on `{name}`, but on {known}.")

    def of_kind(self, *kinds: str) -> list[SetResult]:
        """Return the results on harmful, benign, borderline or task sets."""
        return [result for result in self.results if result.prompt_set.kind in kinds]

    def pooled(self, outcome: str, *kinds: str) -> Rate:
        """Add up an outcome's counts over all sets of these kinds."""
        rates = [result.rate(outcome) for result in self.of_kind(*kinds)]
        return Rate(sum(rate.count for rate in rates), sum(rate.total for rate in rates))


@dataclass(frozen=True)
class Flip:
    """A prompt whose outcome changed, with its category if the set has any, and both answers and verdicts."""

    prompt: str
    category: str | None
    before: Answer
    after: Answer
    outcome_before: str
    outcome_after: str


@dataclass(frozen=True)
class Comparison:
    """Several evaluations of the same prompts; the first is what the others are measured against.

    Args:
        evaluations (`tuple[Evaluation, ...]`): The one before, then each one after. A single one is allowed: its
            report has rates and no changes.
        notes (`tuple[str, ...]`, *optional*): What a reader has to know beside the evaluations' own notes.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.
        runs (`Mapping[str, tuple[str, ...]]`, *optional*): By name, the evaluations of training runs that differ in
            nothing but their seed; [`spread`] sums them up.

    Raises:
        ValueError: If the evaluations differ in prompts, decoding or judges, two have the same name, or `runs` names
            one that is not there.

    Example:

    ```python
    before = evaluate(base, tokenizer, sets, name="before")
    comparison = Comparison((before, evaluate(tuned, tokenizer, sets, name="after")))
    print(comparison.verdict("after").headline)
    print(comparison.change("after", "harmful").sentence("refusal rate"))
    # refusal rate fell from 97.5 % (195/200) to 41.0 % (82/200), difference −56.5 points [−63, −50], p < 0.001
    ```
    """

    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()
    seed: int = 0
    runs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("A comparison needs at least one evaluation, got none.")
        names = [evaluation.name for evaluation in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError(f"Each evaluation of a comparison needs a name of its own, got {names}.")
        unknown = [run for runs in self.runs.values() for run in runs if run not in names[1:]]
        if unknown:
            raise ValueError(f"`runs` names `{unknown[0]}`, and the evaluations after the first are {names[1:]}.")
        for evaluation in self.evaluations[1:]:
            _check_comparable(self.before, evaluation)

    @property
    def before(self) -> Evaluation:
        """What the others are measured against."""
        return self.evaluations[0]

    def __getitem__(self, name: str) -> Evaluation:
        """Return the evaluation of this name."""
        for evaluation in self.evaluations:
            if evaluation.name == name:
                return evaluation
        raise KeyError(f"There is no evaluation `{name}`. There are: {[e.name for e in self.evaluations]}.")

    def verdict(self, after: str) -> SafetyVerdict:
        """Return what this comparison says about the safety of one model; see [`SafetyVerdict`]."""
        from .gate import safety_verdict

        return safety_verdict(self, after)

    def change(self, after: str, prompt_set: str, outcome: str | None = None) -> Change:
        """Compare one evaluation with the one before, prompt by prompt.

        Args:
            after (`str`): Name of the evaluation.
            prompt_set (`str`): Name of the prompt set.
            outcome (`str`, *optional*): What to count; by default refusals, for a task correct answers.

        Returns:
            `Change`: Over the prompts that have a verdict in both.
        """
        old, new = self.before[prompt_set], self[after][prompt_set]
        outcome = outcome or HEADLINES[old.prompt_set.kind]
        pairs = [
            (before == outcome, now == outcome)
            for before, now in zip(old.outcomes, new.outcomes, strict=True)
            if before is not None and now is not None
        ]
        return paired_change([b for b, _ in pairs], [a for _, a in pairs], seed=self.seed)

    def spread(self, runs: str, prompt_set: str, outcome: str | None = None) -> Spread:
        """Sum up a rate over training runs that differ in their seed: its interval is about runs, not prompts.

        Arguments as in [`change`], with one of the names in `runs`; refused if one of the runs measured nothing.
        """
        outcome = outcome or HEADLINES[self.before[prompt_set].prompt_set.kind]
        return Spread(tuple(self[run][prompt_set].rate(outcome) for run in self.runs[runs]))

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before every prompt was answered."""
        answers = (a for e in self.evaluations for result in e.results for a in result.answers)
        return any(answer.error == INTERRUPTED for answer in answers)

    def flips(self, after: str, prompt_set: str) -> list[Flip]:
        """Return the prompts whose outcome differs from the one before, in the set's order."""
        old, new = self.before[prompt_set], self[after][prompt_set]
        asked = old.prompt_set
        labels = asked.categories or (None,) * len(asked)
        pairs = zip(asked.prompts, labels, old.answers, new.answers, old.outcomes, new.outcomes, strict=True)
        return [Flip(*pair) for pair in pairs if None not in pair[-2:] and pair[-2] != pair[-1]]

    def sentences(self, after: str) -> list[str]:
        """Return one sentence for each rate of each prompt set, harmful sets first; what is missing is named, too."""
        lines = [
            self.change(after, result.prompt_set.name, outcome).sentence(f"{name} ({result.prompt_set.name})")
            for kind, names in RATES.items()
            for result in self.before.of_kind(kind)
            for outcome, name in names.items()
            if outcome != "neither"
        ]
        return lines + [f"{kind} prompts: not measured" for kind in RATES if not self.before.of_kind(kind)]

    def all_notes(self) -> list[str]:
        """Return the comparison's notes and those of every evaluation, each with its name."""
        notes = list(self.notes)
        notes += [note for evaluation in self.evaluations[1:] for note in _otherwise_asked(self.before, evaluation)]
        return notes + [f"{e.name}: {note}" for e in self.evaluations for note in e.notes]


def agreements(evaluation: Evaluation | SetResult) -> list[Agreement]:
    """Compare each two judges over all answers that both judged, tasks left out.

    Args:
        evaluation (`Evaluation` or `SetResult`): What several judges judged; with one there is nothing to compare.

    Example:

    ```python
    evaluation = evaluate(model, tokenizer, sets, judges=[PhraseJudge(), LikelihoodJudge()])
    for agreement in agreements(evaluation):
        print(agreement)  # phrases and likelihood agree on 93.0 % (186/200), Cohen's κ 0.84
    ```
    """
    results = evaluation.results if isinstance(evaluation, Evaluation) else (evaluation,)
    judged = [result.verdicts for result in results if result.prompt_set.kind != "task"]
    found = []
    for judges in combinations(dict.fromkeys(name for verdicts in judged for name in verdicts), 2):
        both = [[verdicts[judge] for judge in judges] for verdicts in judged if {*judges} <= verdicts.keys()]
        pairs = [pair for given in both for pair in zip(*given, strict=True) if None not in pair]
        agreed = Rate(sum(a == b for a, b in pairs), len(pairs))
        found.append(Agreement(*judges, agreed, cohens_kappa(pairs)))
    return found


def _otherwise_asked(before: Evaluation, after: Evaluation) -> list[str]:
    """Report another chat template or vocabulary, which may explain a change."""
    one, other = (evaluation.manifest.get("tokenizer", {}) for evaluation in (before, after))
    differences = {
        "chat_template_sha256": f"{after.name} was asked through another chat template than {before.name}, so that a "
        "change may come from the template.",
        "vocabulary_sha256": f"{after.name} has another tokenizer than {before.name}: each was asked through its own, "
        "and the same `max_new_tokens` may hold answers of different length.",
    }
    return [note for key, note in differences.items() if one.get(key) != other.get(key)]


def _check_comparable(before: Evaluation, after: Evaluation) -> None:
    asked = [[(r.prompt_set.name, prompt_set_sha256(r.prompt_set)) for r in e.results] for e in (before, after)]
    if asked[0] != asked[1]:
        names: list[Sequence[Any]] = [[name for name, _ in sets] for sets in asked]
        raise ValueError(
            f"`{before.name}` and `{after.name}` were not asked the same prompts (sets {names[0]} and {names[1]}). "
            "Evaluate both on the same prompt sets, in the same order."
        )
    for part in ("decoding", "judges"):
        values = [e.manifest.get(part) for e in (before, after)]
        if part == "decoding":  # how prompts are batched changes no answer
            values = [{**(value or {}), "batch_size": None} for value in values]
        if values[0] != values[1]:
            raise ValueError(
                f"`{before.name}` and `{after.name}` differ in `{part}`: {values[0]} and {values[1]}. "
                "Evaluate both in the same way."
            )


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
