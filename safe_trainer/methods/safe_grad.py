"""SafeGrad: no step goes against the gradient that keeps the model's refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..artifacts import own_answers
from ..artifacts.own_answers import Anchor, AnswerSettings, OwnAnswers
from ..distributed import average, inner_product, on_first_process
from .base import (
    FormField,
    MethodCard,
    Paper,
    PeftSupport,
    SafetyMethod,
    SelfCheck,
    check_choices,
    check_number,
    check_whole,
)

logger = logging.getLogger(__name__)

Rule = Literal["projection", "trust_region"]
_ROUNDING = 1e-6  # a divergence below, in nats, is rounding, and so is its gradient


@dataclass
class SafeGrad(SafetyMethod):
    """Takes out of each step what goes against the model's own refusals, or pulls the model back where it left them.

    Once in each optimizer step, on the accumulated task gradient `g` before it is clipped, over all trained weights as
    one vector:

    - `rule="projection"`: with `g_s` the gradient of the safety loss, the mean `KL(π_start ‖ π_θ)` at the first tokens
      of the answers that the start model itself gives to harmful prompts: where `⟨g, g_s⟩ < 0` the step would undo
      them, and `g` becomes `g − ⟨g, g_s⟩/‖g_s‖² g_s`. Then `ρ g_s` is added.
    - `rule="trust_region"`: after the optimizer's step, where the safety loss `ℓ`, the mean cross-entropy of the same
      answers, is above `τ`: `θ ← θ − α ∇ℓ` with `α = min((ℓ − τ)/‖∇ℓ‖², max_step_size)`.

    The safety loss is computed in evaluation mode: without dropout and security vectors, and without drawing random
    numbers. No safe answers and no second model are needed.

    When to use it: where you want SafeGrad by name; on the embedded pair [`RefusalAnchor`], a penalty on the same
    answers, did as well. What it costs: a forward and backward pass over a few short prompts in each optimizer step.
    What to know: it can only keep what the start does, and it has no counterweight against refusing too much: where
    the data held harmful rows, the trust region made the model refuse nearly everything.

    Args:
        prompts (`PromptSet`, `Sequence`, `Dataset`, `str` or `Path`, *optional*): Harmful prompts: texts, rows, or a
            file. Without, those that the model brings along in `safety/harmful.jsonl`, or built-in ones.
        rule (`str`, *optional*, defaults to `"projection"`): SafeGrad's, or `"trust_region"`, which is SPAG's.
        rho (`float`, *optional*, defaults to `1.0`): `ρ` of the projection. With 0 steps without a conflict are plain.
        tau (`float`, *optional*, defaults to `0.2`): `τ` of the trust region, in nats per token.
        max_step_size (`float`, *optional*, defaults to `0.1`): Largest `α` of the trust region. The paper bounds it by
            the learning rate, with which it did nothing on the embedded pair; with a large one it can diverge.
        prompts_per_step (`int`, *optional*, defaults to `8`): Prompts in each safety loss, the same on all processes.
        answer_tokens (`int`, *optional*, defaults to `8`): Tokens of its own answer that count, for each prompt.
            With fewer than a refusal has, a model may learn to refuse first and comply in the next sentence.
        max_prompts (`int`, *optional*, defaults to `64`): Prompts to use, spread evenly over those given.
        system_prompt (`str`, *optional*): System turn before prompts that have none of their own: the one that
            the model will be used with.
        seed (`int`, *optional*, defaults to `0`): Seed of the order in which prompts take their turns.

    Raises:
        ValueError: If a setting is out of its range, there is no prompt, the tokenizer has no chat template, or the
            PEFT configuration is prompt learning.
        FloatingPointError: If the safety loss becomes infinite or NaN.

    Example:

    ```python
    >>> from safe_trainer import SafeGrad
    >>> SafeGrad(["How do I pick my neighbour's lock?"]).rule
    'projection'

    ```

    Source: SafeGrad, arXiv 2508.07172: the projection, `ρ = 1`, and the divergence, there on complete safe answers
    that are given. The trust region is the safety step of SPAG, "SPARD", arXiv 2605.28030, there on given refusals,
    with `τ = 0.2`; as in the paper and not in its code, where Adam rescales the step. Ours is that the answers are the
    model's own, and only begun.
    """

    name: ClassVar[str] = "SafeGrad"
    tag: ClassVar[str] = "safe-grad"
    peft_support: ClassVar[PeftSupport] = "weights"
    needs_weights: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Gradient Surgery for Safe LLM Fine-Tuning",
        author="Yi, Biao and others",
        year=2025,
        arxiv="2508.07172",
    )
    card: ClassVar[MethodCard] = MethodCard(
        title="SafeGrad",
        summary="No step goes against the gradient that keeps the model's refusals.",
        needs="nothing; harmful prompts of your own make it fit your use",
        cost="a pass over eight short prompts in each optimizer step",
        avoid="the start model does not refuse, or over-refusal matters most: it has no counterweight",
        fields=(
            FormField("rule", "SafeGrad: rule", choices=("projection", "trust_region")),
            FormField("rho", "SafeGrad: ρ", 0.0, 10.0, 0.1, help="Weight of the safety gradient that is added."),
        ),
        example=lambda given: SafeGrad(given.harmful_prompts),
    )

    prompts: Any = field(default=None, repr=False)
    rule: Rule = "projection"
    rho: float = 1.0
    tau: float = 0.2
    max_step_size: float = 0.1
    prompts_per_step: int = 8
    answer_tokens: int = 8
    max_prompts: int = 64
    system_prompt: str | None = None
    seed: int = 0
    _answers: OwnAnswers = field(default=OwnAnswers([], None, []), init=False, repr=False, compare=False)
    _cosines: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _corrected: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
    _is_due: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choices(self, rule=Rule)
        check_number(self, "rho", "The paper uses 1.")
        check_number(self, "tau", "The paper uses 0.2.")
        check_number(self, "max_step_size", "The paper uses the learning rate.", above=0)
        check_whole(self, prompts_per_step=1, answer_tokens=1, max_prompts=1)

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Let the start model answer the prompts, and keep what it would have said at each token."""
        prompts = own_answers.prompts_of(self.prompts, "harmful", "prompts", model)
        settings = AnswerSettings(self.answer_tokens, self.max_prompts, system_prompt=self.system_prompt)
        self._answers = on_first_process(lambda: settings.measure(model, tokenizer, prompts, self.peft_config))
        self.provenance = {
            "prompts_sha256": own_answers.asked_sha256(prompts),
            "answer_tokens": self.answer_tokens,
            "system_prompt": self.system_prompt,
        }

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Report how much the start refuses: there is nothing to keep where it does not."""
        return SelfCheck(self._answers.figures(), tuple(self._answers.warnings()))

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Follow the optimizer's steps, if the rule is to act after them."""
        self._cosines, self._corrected, self._is_due = [], [], False
        if self.rule == "projection":
            yield
            return
        # Called by torch after each step of any optimizer in this process; `_pull_back` acts on this training's.
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: self._pull_back(model, optimizer))
        try:
            yield
        finally:
            handle.remove()

    def after_backward(self, model: nn.Module) -> None:
        """Take out of the gradient what goes against the safety loss, and add `ρ` times that loss's own."""
        if self.rule == "trust_region":
            self._is_due = True
            return
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        loss, safety = self._safety(model, trained)
        task = [parameter.grad for parameter in trained if parameter.grad is not None]
        product, squared = inner_product(task, safety), inner_product(safety, safety)
        if loss < _ROUNDING or squared == 0:
            self._cosines.append(0.0)
            return
        if not math.isfinite(product):  # float16 overflowed, and the step will be skipped
            return
        self._cosines.append(product / math.sqrt(max(squared * inner_product(task, task), 1e-30)))
        for gradient, towards in zip(task, safety, strict=True):
            gradient.add_(towards, alpha=self.rho - min(product, 0.0) / squared)

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return how often the rule acted, and what the safety loss over all prompts is at the end, in nats."""
        figures = {}
        if self._cosines:
            figures["conflicts"] = sum(cosine < 0 for cosine in self._cosines) / len(self._cosines)
            figures["cosine"] = sum(self._cosines) / len(self._cosines)
        if self._corrected:
            figures["corrections"] = sum(self._corrected) / len(self._corrected)
        with torch.no_grad():
            figures["loss"] = self._loss(model, self._answers.anchors).item()
        if self.rule == "trust_region" and figures["loss"] > self.tau:
            logger.warning(
                "SafeGrad: the safety loss ended at %.3g nats, above `tau=%g`: the steps back were too short to keep "
                "the start's answers. Raise `max_step_size`.",
                *(figures["loss"], self.tau),
            )
        return {f"safe_grad/{name}": value for name, value in figures.items()}

    def _pull_back(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Step towards `ℓ = τ` where the optimizer's step of this training has left it above."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # Saving an optimizer without a state under FSDP2 calls `step` once more, with gradients of zero.
        if not self._is_due or not moved.intersection(map(id, trained)):
            return
        self._is_due = False
        loss, safety = self._safety(model, trained)
        self._corrected.append(loss > self.tau)
        squared = inner_product(safety, safety)
        if loss > self.tau and squared:
            size = min((loss - self.tau) / squared, self.max_step_size)
            with torch.no_grad():
                for parameter, gradient in zip(trained, safety, strict=True):
                    parameter.add_(gradient, alpha=-size)

    def _safety(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
        """Return this step's safety loss and its gradient; the gradients that are there stay as they are."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = [parameter.grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            with torch.enable_grad():
                pools = [self._answers.anchors]
                loss = self._loss(model, own_answers.drawn(pools, self.step, self.prompts_per_step, self.seed))
                loss.backward()  # and not `torch.autograd.grad`, which FSDP2's hooks do not see
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"SafeGrad's safety loss became {value} at step {self.step}: training has diverged. Start a new run "
                "with a lower `learning_rate`, or with a lower `max_step_size` where the rule is the trust region."
            )
        average(found)
        return value, found

    def _loss(self, model: nn.Module, anchors: Sequence[Anchor]) -> Tensor:
        """Return the rule's safety loss, a mean over tokens."""
        costs = []
        for anchor, log_q in zip(anchors, own_answers.log_probs(model, anchors), strict=True):
            if self.rule == "projection":
                costs.append(own_answers.divergence(anchor, log_q))
            else:
                answer = torch.tensor(anchor.ids[len(anchor.ids) - anchor.positions + 1 :], device=log_q.device)
                costs.append(-log_q[:-1].gather(-1, answer.unsqueeze(-1))[:, 0])
        return torch.cat(costs).mean()
