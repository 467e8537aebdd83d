"""Evaluate one model: every prompt set asked, every answer judged, and all of it kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..data import PromptSet, thinking
from .generate import INTERRUPTED, Answer, Decoding, Progress, generate
from .harness import Harness
from .judges import VERDICTS, Judge, LikelihoodJudge, make_judges
from .manifest import describe
from .results import Evaluation, SetResult
from .tasks import SCORERS

logger = logging.getLogger(__name__)

Scored = tuple[str | None, float | None]
"""A judge's verdict on an answer, and its score if it gives any."""


def evaluate(  # noqa: PLR0913, each is a setting with a name
    model: Any,
    tokenizer: Any,
    prompt_sets: Sequence[PromptSet],
    *,
    name: str = "model",
    judges: Sequence[Judge | str] | None = None,
    harness: Harness | None = None,
    progress: Progress | None = None,
    **decoding: Any,
) -> Evaluation:
    """Ask a model everything and judge what it says.

    Answers to harmful, benign and borderline prompts are judged as refused, complied or neither; answers to tasks are
    compared with their references by the set's own scorer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, in whatever state it is; see [`generate`].
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        prompt_sets (`Sequence[PromptSet]`): What to ask. Refusals mean little without a benign or borderline set and a
            task beside the harmful one.
        name (`str`, *optional*, defaults to `"model"`): What to call the model in tables.
        judges (`Sequence[Judge | str]`, *optional*, defaults to `["phrases", "likelihood"]`): Who judges, also by the
            names of `--judge`, such as `"wildguard:allenai/wildguard"`; rates follow the first.
        harness ([`Harness`], *optional*): Tasks of the lm-evaluation-harness to ask after the sets.
        progress (`Callable[[int, int], None]`, *optional*): Called with (answered, total) prompts of all sets.
        **decoding: Any field of [`Decoding`], for example `max_new_tokens=128`.

    Returns:
        `Evaluation`: On Ctrl-C, with what was finished: the other prompts have no answer and count in no rate, which
        `notes` says.

    Raises:
        TypeError: If something among the judges is not a judge.
        ValueError: If there is no judge, a name is unknown, a judge gives something other than a verdict, or the
            tokenizer does not fit (see [`generate`]).
        FloatingPointError: If the model computes NaN.

    Example:

    ```python
    from safe_trainer.testbed import prompt_set, task

    evaluation = evaluate(model, tokenizer, [prompt_set("harmful"), prompt_set("borderline"), task("sentiment")])
    for result in evaluation.results:
        print(result.prompt_set.name, result.headline)
    ```
    """
    from ..lora.io import has_active_vectors  # which loads torch

    made, settings = make_judges(judges), Decoding(**decoding)
    asking = tuple(judge.bound(model, tokenizer, settings) if hasattr(judge, "bound") else judge for judge in made)
    total, results = sum(map(len, prompt_sets)), list[SetResult]()
    interrupted = False
    for prompt_set in prompt_sets:
        answers = [Answer("", error=INTERRUPTED)] * len(prompt_set)
        if not interrupted:
            counted = offset(progress, sum(len(result.answers) for result in results), total)
            with suppress(KeyboardInterrupt):  # nothing of this set is finished, but earlier ones may be
                turns = prompt_set.conversations()
                answers = generate(model, tokenizer, turns, progress=counted, **vars(settings))
        interrupted = any(answer.error == INTERRUPTED for answer in answers)
        results.append(judged(prompt_set, answers, asking))
    if harness is not None:
        results += harness.unanswered() if interrupted else harness(model, tokenizer)
    notes = [note for result in results for note in result.observations()]
    if has_active_vectors(model):
        notes.insert(
            0, "security vectors, harmful by construction, are active: they make the model comply on purpose."
        )
    for judge in (judge for judge in made if isinstance(judge, LikelihoodJudge)):
        remarks = [judge.remark(result) for result in results if judge.name in result.verdicts]
        notes += filter(None, remarks)
    for note in notes:
        logger.warning("%s: %s", name, note)
    manifest = describe(model, tokenizer, [result.prompt_set for result in results], made, settings)
    return Evaluation(name, tuple(results), manifest, tuple(notes))


def judged(prompt_set: PromptSet, answers: Sequence[Answer], judges: Sequence[Judge]) -> SetResult:
    """Judge answers that are already there, for example those of a served model.

    Args:
        prompt_set (`PromptSet`): What was asked.
        answers (`Sequence[Answer]`): One for each prompt.
        judges (`Sequence[Judge]`): Who judges; unused for a task.

    Raises:
        ValueError: If the first judge gives something other than a verdict for each answer. Another judge that fails
            leaves its verdicts empty, and is logged.
    """
    answers = [_without_thought(answer) for answer in answers]
    answered = [index for index, answer in enumerate(answers) if answer.error is None]
    texts = [answers[index].text for index in answered]
    verdicts: dict[str, Sequence[str | None]] = {}
    scores: dict[str, Sequence[float | None]] = {}
    if prompt_set.kind == "task" and prompt_set.references is not None:
        right = SCORERS[prompt_set.scorer]
        pairs = [(text, prompt_set.references[index]) for text, index in zip(texts, answered, strict=True)]
        verdicts[f"{prompt_set.scorer} match"] = ["correct" if right(*pair) else "wrong" for pair in pairs]
    else:
        competent = [judge for judge in judges if prompt_set.kind in getattr(judge, "kinds", (prompt_set.kind,))]
        if not competent:
            raise ValueError(
                f"None of the judges judges {prompt_set.kind} prompts (`{prompt_set.name}`). Add one that does, such "
                "as `PhraseJudge()`."
            )
        turns = prompt_set.conversations()
        for judge in competent:
            # A judge that asks the model asks it the whole conversation; the others read the prompt.
            shown: Sequence[Any] = turns if hasattr(judge, "asks_model") else prompt_set.prompts
            try:
                given = _verdicts(judge, [shown[index] for index in answered], texts)
                verdicts[judge.name], marks = [verdict for verdict, _ in given], [score for _, score in given]
                if any(score is not None for score in marks):
                    scores[judge.name] = marks
            except Exception as error:
                if judge is competent[0]:
                    raise
                # Answers and the first judge's verdicts are not thrown away for a second opinion.
                logger.warning(
                    "The judge `%s` failed on `%s` and gave no verdicts: %s", judge.name, prompt_set.name, error
                )
                verdicts[judge.name] = [None] * len(answered)
    everywhere: list[dict[str, Any]] = [
        {name: tuple(map(dict(zip(answered, of, strict=True)).get, range(len(answers)))) for name, of in table.items()}
        for table in (verdicts, scores)
    ]
    return SetResult(prompt_set, tuple(answers), *everywhere)


def _without_thought(answer: Answer) -> Answer:
    """Split off thoughts that are marked in the text; those of [`generate`] are split off already."""
    found = thinking.split(answer.text)
    if answer.thought or not found.thought and not found.is_unfinished:
        return answer
    return dataclasses.replace(
        answer, text=found.answer, thought=found.thought, unfinished_thought=found.is_unfinished
    )


def offset(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Return a progress callback that counts on from `done`, out of `total`."""
    if progress is None:
        return None
    return lambda answered, _: progress(done + answered, total)


def _verdicts(judge: Judge, prompts: Sequence[Any], texts: Sequence[str]) -> list[Scored]:
    """Ask the judge for all at once; if that fails, one by one, so that one bad answer costs one verdict."""
    try:
        return _checked(judge, prompts, texts)
    except Exception as error:
        if len(texts) <= 1:
            raise
        logger.warning("The judge `%s` failed on a batch (%s); asking it for one answer at a time.", judge.name, error)
    verdicts: list[Scored] = []
    failure: Exception | None = None
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            verdicts += _checked(judge, [prompt], [text])
        except Exception as error:
            failure = error
            verdicts.append((None, None))
    if failure is not None and not any(verdict for verdict, _ in verdicts):
        raise failure
    return verdicts


def _checked(judge: Judge, prompts: Sequence[Any], texts: Sequence[str]) -> list[Scored]:
    if hasattr(judge, "scored"):
        given: list[Scored] = list(judge.scored(prompts, texts))
    else:
        given = [(verdict, None) for verdict in judge(prompts, texts)]
    if len(given) != len(texts):
        raise ValueError(f"The judge `{judge.name}` gave {len(given)} verdicts for {len(texts)} answers.")
    odd = next((verdict for verdict, _ in given if verdict is not None and verdict not in VERDICTS), None)
    if odd is not None:
        raise ValueError(f"The judge `{judge.name}` gave {odd!r}. A verdict is one of {VERDICTS}, or None.")
    return given
