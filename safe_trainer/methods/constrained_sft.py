"""ConstrainedSFT: each answer's first tokens may move only so far from what the start model would say."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..artifacts import calibration
from ..data import opening_of_answers
from ..distributed import on_first_process
from ..lora.modes import evaluation_mode, input_device, without_adapters
from ..lora.updates import base_changing_setting, linear_layers
from .base import FormField, MethodCard, Paper, PeftSupport, SafetyMethod, SelfCheck, check_number, check_whole

_LEAST = 1e-3  # no token's weight is smaller, as in the authors' code
_FEW_MORE = 3  # an answer with at most this many tokens after its opening is a label
_MANY_LABELS = 0.1  # share of answers that are labels from which on it is warned
_ROWS, _SCORED = 512, 32  # rows that the self-check looks at, and those of them that the start model reads


@dataclass
class ConstrainedSFT(SafetyMethod):
    """Trains each answer token on `−(2/β_t) log σ(β_t (log π_θ(y_t | x, y_<t) − log π_start(y_t | x, y_<t)))`.

    Its gradient is that of the cross-entropy times `w_t = 2 σ(−β_t (log π_θ − log π_start))`, which is how it is
    computed: a token's weight is 1 at the start, and falls to 0 as the token becomes likelier than the start model
    finds it. `β_t` is large for an answer's opening, which decides between help and refusal, and small after it. The
    start model is the trained one without its adapter, in evaluation mode: one more forward pass for each micro-batch,
    and neither a copy of the model nor log-probabilities to keep, so packing, shuffling and streams need nothing.

    When to use it: rows with long answers whose openings may be harmful. What it costs: that pass, and whatever the
    task must change in an answer's first tokens. Not against an identity shift: on the embedded pair the model then
    refuses first and helps next, and refuses half of the harmless prompts. Not for labels: an answer of a few tokens
    is all opening, and is learned slowly or not at all; a warning counts such rows.

    Together with [`SecurityVectors`] they act in both, the trained model and the start model, so that weights are 1 at
    the start there too.

    Args:
        opening_beta (`float`, *optional*, defaults to `2.0`): `β_t` of the opening from its second token on.
        first_token_beta (`float`, *optional*, defaults to `0.5`): `β_1`. Smaller, since the first token's loss is the
            largest at the start. Raise it to 2 where rows open with the word that refusals open with, such as "I":
            otherwise that word is learned, what follows it is held, and harmless prompts are refused.
        opening_tokens (`int`, *optional*, defaults to `5`): Tokens of the opening, counted in each answer: each
            turn of the assistant that the loss covers, in each row of a packed sequence.
        beta (`float`, *optional*, defaults to `0.1`): `β_t` after the opening. Near 0 is plain training.

    Raises:
        ValueError: If a setting is out of its range, the model is trained in full or came with an adapter, the PEFT
            configuration changes the base weights, trains biases or is prompt learning, or the trainer's loss is not
            TRL's own.

    Example:

    ```python
    >>> from safe_trainer import ConstrainedSFT
    >>> ConstrainedSFT().opening_beta
    2.0

    ```

    Source: Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, arXiv 2406.05946,
    section 4, with the settings of its code. There the optimizer is AdamW with `adam_beta1=0.5` and ten warm-up steps,
    which are yours to set, and the mean is over a micro-batch; here it is over all tokens of an optimizer step.
    """

    name: ClassVar[str] = "Constrained SFT"
    tag: ClassVar[str] = "constrained-sft"
    peft_support: ClassVar[PeftSupport] = "weights"
    needs_weights: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Safety Alignment Should Be Made More Than Just a Few Tokens Deep",
        author="Qi, Xiangyu and others",
        year=2025,
        arxiv="2406.05946",
        venue="The Thirteenth International Conference on Learning Representations",
    )
    card: ClassVar[MethodCard] = MethodCard(
        title="Constrained SFT",
        summary="Each answer's first tokens may move only so far from what the start model would say.",
        needs="nothing",
        cost="one more forward pass for each micro-batch, and what the task must change in an answer's first tokens",
        avoid="labels and other answers of a few tokens, which are learned slowly or not at all",
        fields=(
            FormField(
                "opening_beta", "Constrained SFT: β of the opening", 0.1, 10.0, 0.1, help="Higher holds it more."
            ),
            FormField("opening_tokens", "Constrained SFT: tokens of the opening", 1, 20, 1),
        ),
        example=lambda given: ConstrainedSFT(),
    )

    opening_beta: float = 2.0
    first_token_beta: float = 0.5
    opening_tokens: int = 5
    beta: float = 0.1
    _lengths: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _written: int = field(default=0, init=False, repr=False, compare=False)
    _without_prompt: float = field(default=0.0, init=False, repr=False, compare=False)
    _start: float = field(default=0.0, init=False, repr=False, compare=False)
    _sums: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, usual in (("opening_beta", 2), ("first_token_beta", 0.5), ("beta", 0.1)):
            check_number(self, name, f"The paper uses {usual:g}.", above=0)
        check_whole(self, opening_tokens=1)

    def adapt_peft_config(self, config: Any) -> Any:
        """Refuse whatever leaves no start model when the adapter is switched off; change nothing."""
        config = super().adapt_peft_config(config)
        if config is None:
            raise ValueError(
                f"{self.name} needs `peft_config`: its start model is the trained one with the adapter switched off, "
                "which full-parameter training and a model that comes with an adapter do not have. Pass the base "
                "model and `peft_config=LoraConfig(...)`."
            )
        if setting := base_changing_setting(config):
            raise ValueError(
                f"{self.name} does not work with `{setting}`, which changes the base weights: with the adapter "
                "switched off they are not the start model. Leave it out."
            )
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ValueError(
                f"{self.name} does not work with `bias={bias!r}`, which trains biases of the base model: with the "
                'adapter switched off they are no longer those of the start model. Use `bias="none"`.'
            )
        return config

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Measure how long answers are, and how likely the start model finds their openings, on rows drawn."""
        drawn: dict[str, Any] = {"argument": "train_dataset", "samples": _ROWS, "max_length": sys.maxsize}
        rows = calibration.examples_from(train_dataset, tokenizer, **drawn)
        opening = opening_of_answers(tokenizer)
        self._written = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
        self._lengths = [length for row in rows for length in _lengths(row)]
        self._without_prompt = fmean(row.is_answer[0] for row in rows)
        self._start = on_first_process(lambda: self._opening_log_prob(model, rows[:_SCORED]))

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Report answers that are all opening, and rows whose opening is not an answer's."""
        longest = self.opening_tokens + _FEW_MORE
        labels = fmean(length <= longest for length in self._lengths)
        figures = {
            "share of answers within the opening": fmean(length <= self.opening_tokens for length in self._lengths),
            "log-probability of an opening's token at the start (mean)": self._start,
        }
        warnings = []
        if labels >= _MANY_LABELS:
            warnings.append(
                f"{labels:.0%} of {len(self._lengths)} answers have at most {longest} tokens, of which the first "
                f"{self.opening_tokens} are held: such labels are learned slowly or not at all. Use another method, "
                "or lower `opening_tokens`."
            )
        if self._written and self.opening_tokens < (enough := ConstrainedSFT.opening_tokens + self._written):
            warnings.append(
                f"The chat template begins every answer with {self._written} tokens of its own, the same in refusals "
                f"and in help, and they count among the {self.opening_tokens} that are held. Raise `opening_tokens` "
                f"to {enough}."
            )
        if self._without_prompt:
            warnings.append(
                f"In {self._without_prompt:.0%} of the rows the loss begins with the first token, so what is held is "
                "not the opening of an answer: the loss covers prompts, or packing has cut rows. Give rows with "
                "`prompt` and `completion`, or set `assistant_only_loss=True`, and do not pack with "
                '`packing_strategy="wrapped"`.'
            )
        return SelfCheck(figures, tuple(warnings))

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Reset the counts of weights."""
        self._sums = {"opening": [0.0, 0.0], "later": [0.0, 0.0]}
        yield

    def token_weights(self, model: nn.Module, inputs: Mapping[str, Any], log_probs: Tensor) -> Tensor:
        """Return `2 σ(−β_t (log π_θ − log π_start))` for each token, at least 0.001."""
        # The mode of a linear layer means nothing but to security vectors, which act in training mode only.
        linear = {layer.outer for layer in linear_layers(model).values()}
        with torch.no_grad(), without_adapters(model), evaluation_mode(model, but=linear):
            start = model(**inputs).log_probs
        positions = inputs.get("position_ids")
        restarts = None if positions is None else positions[:, 1:] == 0
        places = _places(inputs["labels"][:, 1:] != -100, restarts).to(log_probs.device)
        opening = torch.where(places == 1, self.first_token_beta, self.opening_beta)
        beta = torch.where(places <= self.opening_tokens, opening, self.beta)
        weights = (2 * torch.sigmoid(-beta * (log_probs - start))).clamp(min=_LEAST)
        for part, chosen in (("opening", places <= self.opening_tokens), ("later", places > self.opening_tokens)):
            found = weights[chosen & (places > 0)]
            self._sums[part][0] += found.sum().item()
            self._sums[part][1] += found.numel()
        return weights

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return the mean weight of openings and of what follows, in this process: what is below 1 was held back."""
        return {f"constrained_sft/{part}_weight": total / n for part, (total, n) in self._sums.items() if n}

    def _opening_log_prob(self, model: Any, rows: Sequence[calibration.Example]) -> float:
        found = []
        with torch.no_grad(), calibration.measuring(model), without_adapters(model):
            for row in rows:
                ids = torch.tensor([row.ids], device=input_device(model))
                places = _places(torch.tensor([row.is_answer[1:]]))[0].to(ids.device)
                chosen = (places > 0) & (places <= self.opening_tokens)
                log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1][chosen].float().log_softmax(-1)
                found.append(log_probs.gather(-1, ids[0, 1:][chosen].unsqueeze(-1)))
        return torch.cat(found).mean().item()


def _places(is_answer: Tensor, restarts: Tensor | None = None) -> Tensor:
    """Return each answer token's place in its answer, from 1, and 0 for all other tokens; both (batch, tokens)."""
    goes_on = pad(is_answer[:, :-1], (1, 0))
    if restarts is not None:
        goes_on = goes_on & ~restarts
    places = torch.arange(1, is_answer.shape[1] + 1, device=is_answer.device)
    starts = torch.where(is_answer & ~goes_on, places, 0).cummax(-1).values
    return torch.where(is_answer, places - starts + 1, 0)


def _lengths(row: calibration.Example) -> list[int]:
    """Return how many tokens each answer of a row has."""
    places = _places(torch.tensor([row.is_answer[1:]]))[0].tolist()
    return [place for place, following in pairwise([*places, 0]) if place >= following and place]
