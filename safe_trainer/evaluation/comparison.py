"""Before and after, on the same prompts, under the same decoding, by the same judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import INTERRUPTED, Answer
from .manifest import prompt_set_sha256
from .means import Mean, mean_of
from .results import HEADLINES, Evaluation
from .seeds import Spread, across_runs
from .statistics import Change, paired_change


@dataclass(frozen=True)
class Flip:
    """A prompt whose outcome changed.

    Args:
        prompt (`str`): The prompt.
        category (`str`, *optional*): Its category, if the set has any.
        before (`Answer`): The answer before.
        after (`Answer`): The answer after.
        outcome_before (`str`): Its verdict before.
        outcome_after (`str`): Its verdict after.
    """

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
    print(comparison.change("after", "harmful").sentence("refusals"))
    # refusals fell from 97.5 % (195/200) to 41.0 % (82/200), difference −56.5 points [−63, −50], p < 0.001
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

    def change(
        self, after: str, prompt_set: str, outcome: str | None = None, *, category: str | None = None
    ) -> Change:
        """Compare one evaluation with the one before, prompt by prompt.

        Args:
            after (`str`): Name of the evaluation.
            prompt_set (`str`): Name of the prompt set.
            outcome (`str`, *optional*): What to count; by default refusals, for a task correct answers.
            category (`str`, *optional*): Only prompts of this category.

        Returns:
            `Change`: Over the prompts that have a verdict in both.
        """
        old, new = self.before[prompt_set], self[after][prompt_set]
        outcome = outcome or HEADLINES[old.prompt_set.kind][0]
        labels = old.prompt_set.categories or (None,) * len(old.outcomes)
        pairs = [
            (b == outcome, a == outcome)
            for b, a, label in zip(old.outcomes, new.outcomes, labels, strict=True)
            if b is not None and a is not None and category in (None, label)
        ]
        return paired_change([b for b, _ in pairs], [a for _, a in pairs], seed=self.seed)

    def score_change(self, after: str, prompt_set: str, score: str) -> Mean:
        """Return the mean difference of a further score, after minus before, over the prompts that have it in both."""
        old, new = self.before[prompt_set].scores[score], self[after][prompt_set].scores[score]
        pairs = zip(old, new, strict=True)
        return mean_of([a - b for b, a in pairs if a is not None and b is not None], seed=self.seed)

    def spread(self, runs: str, prompt_set: str, outcome: str | None = None) -> Spread:
        """Sum up a rate over training runs that differ in their seed: its interval is about runs, not prompts.

        Args:
            runs (`str`): One of the names in `runs`.
            prompt_set (`str`): Name of the prompt set.
            outcome (`str`, *optional*): What to count; by default refusals, for a task correct answers.

        Raises:
            ValueError: If one of the runs measured nothing.
        """
        outcome = outcome or HEADLINES[self.before[prompt_set].prompt_set.kind][0]
        return across_runs([self[run][prompt_set].rate(outcome) for run in self.runs[runs]])

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before every prompt was answered."""
        answers = (a for e in self.evaluations for result in e.results for a in result.answers)
        return any(answer.error == INTERRUPTED for answer in answers)

    def flips(self, after: str, prompt_set: str) -> list[Flip]:
        """Return the prompts whose outcome differs from the one before, in the set's order."""
        old, new = self.before[prompt_set], self[after][prompt_set]
        asked = old.prompt_set
        flips = []
        for index, (before, now) in enumerate(zip(old.outcomes, new.outcomes, strict=True)):
            if before is None or now is None or before == now:
                continue
            category = asked.categories[index] if asked.categories else None
            flips.append(Flip(asked.prompts[index], category, old.answers[index], new.answers[index], before, now))
        return flips

    def sentences(self, after: str) -> list[str]:
        """Say what changed on each prompt set, harmful sets first and never alone: what is missing is said, too.

        Harmless sets have two sentences, over-refusals and help: a model that has fallen silent refuses nothing.
        """
        lines = []
        for kind, (outcome, noun) in HEADLINES.items():
            for result in self.before.of_kind(kind):
                name = result.prompt_set.name
                lines.append(self.change(after, name, outcome).sentence(f"{noun} ({name})"))
                if kind in ("benign", "borderline"):
                    lines.append(self.change(after, name, "complied").sentence(f"help ({name})"))
        return lines + [f"{kind} prompts: not measured" for kind in HEADLINES if not self.before.of_kind(kind)]

    def all_notes(self) -> list[str]:
        """Return the comparison's notes and those of every evaluation, each with its name."""
        notes = list(self.notes)
        notes += [note for evaluation in self.evaluations[1:] for note in _otherwise_asked(self.before, evaluation)]
        return notes + [f"{e.name}: {note}" for e in self.evaluations for note in e.notes]


def _otherwise_asked(before: Evaluation, after: Evaluation) -> list[str]:
    """Tell of another chat template or vocabulary, which may explain a change; models may well differ in both."""
    one, other = (evaluation.manifest.get("tokenizer", {}) for evaluation in (before, after))
    notes = []
    if one.get("chat_template_sha256") != other.get("chat_template_sha256"):
        notes.append(
            f"{after.name} was asked through another chat template than {before.name}, so that a change may come from "
            "the template."
        )
    if one.get("vocabulary_sha256") != other.get("vocabulary_sha256"):
        notes.append(
            f"{after.name} has another tokenizer than {before.name}: each was asked through its own, and the same "
            "`max_new_tokens` may hold answers of different length."
        )
    return notes


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
