"""Tasks of EleutherAI's lm-evaluation-harness, asked of the model in memory, so that they are paired like any set."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from ..data import PromptSet, thinking
from .generate import INTERRUPTED, Answer
from .results import SetResult
from .state import examining

logger = logging.getLogger(__name__)

PREFIX = "lm-eval:"
_CLOSING = "</think>"  # what thoughts end with that the harness is to leave out before it looks for an answer


class Harness:
    """Asks tasks of the lm-evaluation-harness, for the argument `harness` of [`evaluate`] and [`compare`].

    Each task is a set of the kind `"task"` in the report: right or wrong question by question, so that a change is
    paired. Questions, few-shot examples, decoding and scoring are the harness's own; the model is asked through its
    chat template, and its thoughts do not count as an answer. Metrics that are not right or wrong for each question,
    such as perplexity, are left out.

    Args:
        tasks (`Sequence[str]`): Names of tasks or groups of tasks, such as `"gsm8k"`, or files of tasks (`.yaml`).
        limit (`int`, *optional*): Questions of each task, from the first.
        batch_size (`int`, *optional*, defaults to `32`): Questions that are answered at once.

    Raises:
        ValueError: If the harness is not installed; when it asks, if a task is unknown or has no fitting metric.

    Example:

    ```python
    comparison = compare(model, tokenizer, sets, {"tuned": "out"}, harness=Harness(["gsm8k"], limit=200))
    print(comparison.change("tuned", "lm-eval:gsm8k").sentence("accuracy"))
    ```
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None, batch_size: int = 32) -> None:
        try:
            import lm_eval  # noqa: F401, only whether it is there
        except ImportError as error:
            raise ValueError(
                "Tasks of the lm-evaluation-harness need it installed: pip install '.[lm-eval]' in a checkout of "
                "safe_trainer."
            ) from error
        self.tasks, self.limit, self.batch_size = list(tasks), limit, batch_size
        self._asked: list[SetResult] = []

    def __call__(self, model: Any, tokenizer: Any) -> list[SetResult]:
        """Ask a model; on Ctrl-C, if another model was asked before, its results are those of no answer."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with examining(model):
                thinks = _CLOSING in str(tokenizer.chat_template)
                options: dict[str, Any] = {"think_end_token": _CLOSING} if thinks else {}
                asked = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=self.batch_size, **options
                )
                found = simple_evaluate(
                    asked, tasks=self.tasks, limit=self.limit, bootstrap_iters=0, apply_chat_template=True
                )
        except KeyError as error:
            raise ValueError(
                f"The lm-evaluation-harness found no such task: {error}. See `lm-eval ls tasks`."
            ) from error
        except KeyboardInterrupt:
            if not self._asked:
                raise
            return self.unanswered()
        samples, versions = found["samples"], found["versions"]
        first = {result.prompt_set.name: result for result in self._asked}
        self._asked = [
            _result(task, rows, versions.get(task), first.get(f"{PREFIX}{task}")) for task, rows in samples.items()
        ]
        return self._asked

    def unanswered(self) -> list[SetResult]:
        """Return the tasks as a model leaves them that is interrupted before it is asked."""
        return [
            SetResult(
                result.prompt_set,
                tuple(Answer("", error=INTERRUPTED) for _ in result.answers),
                {metric: (None,) * len(result.answers) for metric in result.verdicts},
            )
            for result in self._asked
        ]


def _result(task: str, samples: Sequence[dict[str, Any]], version: Any, first: SetResult | None = None) -> SetResult:
    """Return a task's questions with the model's answers, right or wrong by each metric and filter of answers.

    Metrics are those of the `first` model that was asked: a graded one may by chance be 0 or 1 for all answers of one
    model, and would be paired with another metric of the next.
    """
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    verdicts: dict[str, tuple[str | None, ...]] = {}
    for name, rows in by_filter.items():
        for metric in rows[0]["metrics"]:
            title = metric if name == "none" else f"{metric}, {name}"
            graded = next((row[metric] for row in rows if row[metric] not in (0, 1)), None)
            if graded is None and (first is None or title in first.verdicts):
                verdicts[title] = tuple("correct" if row[metric] else "wrong" for row in rows)
            elif first is not None and title in first.verdicts:
                verdicts[title] = (None,) * len(rows)
                logger.warning(
                    "`%s` of `%s%s` is %s for a question of this model, and was 0 or 1 for all of the first: it is no "
                    "metric of right and wrong, and counts in no rate.", title, PREFIX, task, graded,
                )  # fmt: skip
    rows = next(iter(by_filter.values()))
    if not verdicts:
        raise ValueError(
            f"`{PREFIX}{task}` has no metric that is right or wrong for each question, only "
            f"{', '.join(rows[0]['metrics'])}. Take a task with one, such as exact_match or acc."
        )
    texts = [_texts(row) for row in rows]
    prompts, references, replies = zip(*texts, strict=True)
    pairs = zip(replies, prompts, strict=True)
    said = [thinking.split(reply, is_open=thinking.is_open(prompt)) for reply, prompt in pairs]
    answers = tuple(Answer(s.answer, thought=s.thought, unfinished_thought=s.is_unfinished) for s in said)
    source = f"{PREFIX}{task}" + (f"@{version}" if version is not None else "")
    asked = PromptSet(f"{PREFIX}{task}", "task", prompts, references=references, source=source)
    return SetResult(asked, answers, verdicts)


def _texts(sample: dict[str, Any]) -> tuple[str, str, str]:
    """Return a question as it was asked, the right answer, and the model's: of several choices the likeliest."""
    arguments, target, replies = sample["arguments"], sample["target"], sample["resps"]
    prompt = str(arguments[0][0])
    if len(arguments) == 1:
        return prompt, str(target), str(replies[0][0])
    choices = [str(choice[1]).strip() for choice in arguments]
    likelihoods = [float(reply[0][0]) for reply in replies]
    right = choices[target] if isinstance(target, int) and target < len(choices) else str(target)
    return prompt, right, choices[likelihoods.index(max(likelihoods))]
