"""How good the answers to a task are, where right or wrong does not say it all."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data import PromptSet
from .prompting import encode, turn_end
from .results import Evaluation, SetResult
from .state import examining
from .statistics import Mean, ratio_of

Scorer = Callable[[str, str], float]

_WORD = re.compile(r"\w+")


def exact_match(answer: str, reference: str) -> bool:
    r"""Tell whether an answer is the reference, but for case, whitespace and final punctuation.

    ```python
    >>> exact_match(" Positive.\n", "positive"), exact_match("positive, I think", "positive")
    (True, False)

    ```
    """
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the reference's words, from 0 to 1.

    Words are compared without case and punctuation, as often as they occur; two texts without words are equal.

    ```python
    >>> token_f1("The capital is Paris.", "Paris")  # precision 1/4, recall 1
    0.4

    ```
    """
    said, expected = (Counter(_WORD.findall(text.casefold())) for text in (answer, reference))
    common = (said & expected).total()
    if not said or not expected:
        return float(said == expected)
    return 2 * common / (said.total() + expected.total())


def rouge(kind: str = "rougeL") -> Scorer:
    """Return a scorer for ROUGE (Lin 2004), computed by the `rouge-score` library, as F-measure from 0 to 1.

    Args:
        kind (`str`, *optional*, defaults to `"rougeL"`): `"rouge1"`, `"rouge2"`, `"rougeL"` or another that the
            library knows.

    Raises:
        ImportError: If `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs `rouge-score`: pip install rouge-score") from error
    library = RougeScorer([kind], use_stemmer=True)
    return lambda answer, reference: float(library.score(reference, answer)[kind].fmeasure)


def scored(evaluation: Evaluation, scorers: Mapping[str, Scorer]) -> Evaluation:
    """Add scores to the tasks of an evaluation; its answers are there already, so nothing is asked again.

    Args:
        evaluation (`Evaluation`): With at least one task.
        scorers (`Mapping[str, Callable[[str, str], float]]`): By name, a function of an answer and its reference:
            [`token_f1`], [`rouge`], or yours.

    Returns:
        `Evaluation`: The same, where each task's `scores` has a value for each prompt; `None` where there is no
            answer.

    Raises:
        ValueError: If there is no task, or a scorer returns something other than a finite number.

    Example:

    ```python
    evaluation = scored(evaluation, {"token F1": token_f1, "ROUGE-L": rouge(), "short": lambda a, r: len(a) <= len(r)})
    print(evaluation["how_to"].mean_score("ROUGE-L"))
    ```
    """
    if not evaluation.of_kind("task"):
        raise ValueError(f"`{evaluation.name}` was examined on no task, so there is nothing to score.")
    results = [
        replace(result, scores={**result.scores, **{name: _scores(result, name, f) for name, f in scorers.items()}})
        if result.prompt_set.kind == "task"
        else result
        for result in evaluation.results
    ]
    return replace(evaluation, results=tuple(results))


def _scores(result: SetResult, name: str, scorer: Scorer) -> tuple[float | None, ...]:
    values: list[float | None] = []
    for answer, reference in zip(result.answers, result.prompt_set.references or (), strict=True):
        value = None if answer.error else float(scorer(answer.text, reference))
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"The scorer `{name}` gave {value} for the answer {answer.text[:60]!r}; it must be finite."
            )
        values.append(value)
    return tuple(values)


def perplexity(
    model: Any, tokenizer: Any, task: PromptSet, *, system_prompt: str | None = None, batch_size: int = 16
) -> Mean:
    """Return the model's perplexity on a task's references, given their prompts.

    It is exp of [`reference_loss`]. Only perplexities under one tokenizer can be compared.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; left in the state it was in.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        task (`PromptSet`): Prompts with references.
        system_prompt (`str`, *optional*): System turn before each prompt.
        batch_size (`int`, *optional*, defaults to `16`): References per forward pass.

    Returns:
        `Mean`: With a 95 % interval by resampling the references.

    Raises:
        ValueError: If the prompt set has no references.
        FloatingPointError: If the model computes NaN.

    Example:

    ```python
    print(perplexity(model, tokenizer, task("how_to")))  # 3.214 (100) [3.102, 3.335]
    ```
    """
    loss = reference_loss(model, tokenizer, task, system_prompt=system_prompt, batch_size=batch_size)
    return Mean(math.exp(loss.value), loss.count, math.exp(loss.low), math.exp(loss.high))


def reference_loss(
    model: Any, tokenizer: Any, task: PromptSet, *, system_prompt: str | None = None, batch_size: int = 16
) -> Mean:
    """Return the mean negative log-likelihood of a task's references, given their prompts, in nats per token.

    The end of the turn is included; each token counts the same, so long references weigh more. Arguments, interval and
    errors as in [`perplexity`].
    """
    if task.references is None:
        raise ValueError(f"The prompt set `{task.name}` has no references to compute a perplexity on.")
    heads = encode(model, tokenizer, task.conversations(), system_prompt, close_thought=True)
    end = turn_end(tokenizer)
    tails = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in task.references]
    losses: list[float] = []
    with examining(model):
        for start in range(0, len(heads), batch_size):
            losses += _losses(model, heads[start : start + batch_size], tails[start : start + batch_size])
    return ratio_of(losses, [len(tail) for tail in tails])


def _losses(model: Any, heads: Sequence[list[int]], tails: Sequence[list[int]]) -> list[float]:
    """Return −log P(tail | head) of each pair."""
    import torch

    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.zeros(len(heads), longest, dtype=torch.long, device=model.device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        mask[row, : len(head) + len(tail)] = 1
        labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(-1)
    if losses.isnan().any():
        raise FloatingPointError("The model's logits are NaN, so it has no perplexity.")
    found: list[float] = losses.tolist()
    return found
