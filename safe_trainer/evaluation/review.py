"""Review by hand: people label answers that flipped or on which judges disagree, and rates are counted again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import PromptSet
from .comparison import Comparison
from .judges import VERDICTS, Verdict
from .report import write_atomically
from .results import SetResult, agreements
from .statistics import Agreement
from .storage import from_json

HUMAN = "human"
_KIND = "safe_trainer labels"
_FIELDS = ("prompt_set", "prompt", "answer")  # what an answer is known by, whichever model gave it


@dataclass(frozen=True)
class Question:
    """An answer to label by hand.

    Args:
        prompt_set (`str`): Name of the set.
        kind (`str`): `"harmful"`, `"benign"` or `"borderline"`.
        prompt (`str`): The prompt, after what was said before it.
        turns (`tuple[dict, ...]`): What the model was asked: system turn, context, and the prompt in its frame.
        answer (`str`): What it said. Which model said it and how it was judged is left out, so as not to influence.
        reasons (`tuple[str, ...]`): Why it is asked: `"flip"` (its prompt's outcome changed), `"disagreement"` (of
            judges) or `"no verdict"` (of the first judge).
    """

    prompt_set: str
    kind: str
    prompt: str
    turns: tuple[dict[str, str], ...]
    answer: str
    reasons: tuple[str, ...]


class Review:
    r"""The labels that people give to a comparison's answers, kept in a file next to it.

    Labels belong to answers, not to models: two models that say the same are labelled once, and labels stay where a
    comparison is made again.

    Args:
        report (`str` or `Path`): A `comparison.json` that [`write_report`] wrote, or its folder. The labels go to
            `comparison.labels.json` next to it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no comparison, or the file of labels is damaged.

    Example:

    ```python
    review = Review("report")
    for question in review.questions:
        if review.label(question) is None:
            review.set_label(question, ask_a_person(question.turns, question.answer))  # "refused", for example
    print(*review.agreements(), sep="\n")  # human and phrases agree on 81.2 % (26/32), Cohen's κ 0.64
    write_report(review.result(), "report", "comparison.reviewed")
    ```
    """

    def __init__(self, report: str | Path) -> None:
        path = Path(report)
        path = path / "comparison.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"There is no comparison `{path}`. Give the folder that `--output` wrote.")
        self.comparison = from_json(path.read_bytes())
        self.path = path.with_name(f"{path.stem}.labels.json")
        self.questions = _questions(self.comparison)
        self._labels: dict[tuple[str, str, str], Verdict] = _read(self.path) if self.path.is_file() else {}

    def label(self, question: Question) -> Verdict | None:
        """Return the label of an answer; `None` if it has none."""
        return self._labels.get((question.prompt_set, question.prompt, question.answer))

    def set_label(self, question: Question, label: Verdict) -> None:
        """Label an answer to one of the `questions`, and save all labels; the file is complete or as it was before."""
        if label not in VERDICTS:
            raise ValueError(f"`label` must be one of {', '.join(VERDICTS)}, got {label!r}.")
        self._labels[question.prompt_set, question.prompt, question.answer] = label
        labels = [dict(zip((*_FIELDS, "label"), (*key, value), strict=True)) for key, value in self._labels.items()]
        content = {"kind": _KIND, "format": 1, "labels": labels}
        write_atomically(self.path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @property
    def labelled(self) -> int:
        """How many of the questions have a label."""
        return sum(self.label(question) is not None for question in self.questions)

    def agreements(self) -> list[Agreement]:
        """Compare the labels with each judge's verdicts, over all labelled answers of all models."""
        results = [
            replace(result, verdicts={HUMAN: self._of(result), **result.verdicts})
            for evaluation in self.comparison.evaluations
            for result in evaluation.results
        ]
        return [agreement for agreement in agreements(results) if agreement.first == HUMAN]

    def result(self) -> Comparison:
        """Return the comparison with labels in place of the first judge's verdicts, which are kept next to them."""
        evaluations = [
            replace(evaluation, results=tuple(map(self._relabelled, evaluation.results)))
            for evaluation in self.comparison.evaluations
        ]
        note = (
            f"{self.labelled} of {len(self.questions)} answers whose outcome flipped, on which judges disagree or "
            f"which have no verdict were labelled by hand. {'. '.join(map(str, self.agreements()))}. These are the "
            "doubtful answers, not a sample of all."
        )
        return replace(self.comparison, evaluations=tuple(evaluations), notes=(*self.comparison.notes, note))

    def _of(self, result: SetResult) -> tuple[Verdict | None, ...]:
        asked = result.prompt_set
        pairs = enumerate(result.answers)
        return tuple(self._labels.get((asked.name, _asked(asked, index), answer.text)) for index, answer in pairs)

    def _relabelled(self, result: SetResult) -> SetResult:
        if result.prompt_set.kind == "task":
            return result
        pairs = zip(self._of(result), result.outcomes, strict=True)
        first = f"{next(iter(result.verdicts))}, reviewed"
        return replace(result, verdicts={first: tuple(label or given for label, given in pairs), **result.verdicts})


def _questions(comparison: Comparison) -> list[Question]:
    """Return the answers that are worth a look, prompt by prompt, each text once."""
    found: dict[tuple[str, str, str], Question] = {}
    for results in zip(*(evaluation.results for evaluation in comparison.evaluations), strict=True):
        asked = results[0].prompt_set
        for index, turns in enumerate(asked.conversations() if asked.kind != "task" else ()):
            for position, result in enumerate(results):
                answer, reasons = result.answers[index], _reasons(results, position, index)
                if reasons and answer.error is None:
                    prompt = _asked(asked, index)
                    question = Question(asked.name, asked.kind, prompt, tuple(turns), answer.text, reasons)
                    found.setdefault((asked.name, question.prompt, answer.text), question)
    return list(found.values())


def _asked(asked: PromptSet, index: int) -> str:
    """Return a prompt after what was said before it: "Go on." is asked in many conversations."""
    before = asked.contexts[index] if asked.contexts else ()
    return "\n".join([*(turn["content"] for turn in before), asked.prompts[index]])


def _reasons(results: Sequence[SetResult], position: int, index: int) -> tuple[str, ...]:
    before, *after = [result.outcomes[index] for result in results]
    flipped = [None not in (before, outcome) and outcome != before for outcome in after]
    verdicts = [given[index] for given in results[position].verdicts.values()]
    reasons = {
        "flip": any(flipped) if position == 0 else flipped[position - 1],
        "disagreement": len({*verdicts} - {None}) > 1,
        "no verdict": verdicts[0] is None,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def _read(path: Path) -> dict[tuple[Any, ...], Verdict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != _KIND or content["format"] != 1:
            raise ValueError(f"it is of the kind {content['kind']!r}, format {content['format']!r}")
        labels = {tuple(row[name] for name in _FIELDS): row["label"] for row in content["labels"]}
        odd = set(labels.values()) - {*VERDICTS}
        if odd:
            raise ValueError(f"{min(map(str, odd))!r} is none of {', '.join(VERDICTS)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The labels in `{path}` cannot be read: {error!r}. Fix the file, or move it away to begin again."
        ) from error
    return labels
