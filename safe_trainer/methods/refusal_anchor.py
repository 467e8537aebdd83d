"""RefusalAnchor: hold the model to the first words of its own refusals, and keep these words from harmless prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..artifacts import own_answers
from ..artifacts.own_answers import Anchor, AnswerSettings, OwnAnswers
from ..data import Kind, PromptSet
from ..distributed import on_first_process
from .base import FormField, MethodCard, PeftSupport, PenaltyMethod, SelfCheck, check_number, check_whole

logger = logging.getLogger(__name__)


@dataclass
class RefusalAnchor(PenaltyMethod):
    """Adds `λ · (mean KL(π_start(· | x, y_<t) ‖ π_θ(· | x, y_<t)) + mean Σ (c_θ(r|z) − c_start(r|z))₊)` to the loss.

    The first mean is over harmful prompts `x` and the first tokens `y` of the answers that the model gives *before*
    fine-tuning: what it would say there is computed once, and fine-tuning pays for saying something else. The second
    is the counterweight, so that the model does not learn to refuse everything: over benign prompts `z` it pays for
    openings `r` of the model's own refusals that have become likelier than they were, `c(r|z) = −log(1 − π(r|z))`. No
    harmful answers and no second model are needed.

    When to use it: against the drift of benign fine-tuning and against identity shift, where it is the best single
    method of this library; together with [`SecurityVectors`] against harmful rows, which alone it slows and does not
    stop. What it costs: a forward and backward pass over a few short prompts in each micro-batch.
    What to know: it can only hold what the start does. If that complies with the harmful prompts, a warning says so.

    Its forward pass runs in evaluation mode: without dropout and security vectors, and without drawing random numbers.

    Args:
        prompts (`PromptSet`, `Sequence`, `Dataset`, `str` or `Path`, *optional*): Harmful prompts: texts, rows, or a
            file. Without, those that the model brings along in `safety/harmful.jsonl`, or built-in ones.
        benign_prompts (the same, *optional*): Harmless prompts; without, those of `safety/benign.jsonl`, or built-in
            ones. `[]` for none, at the cost of refusals of harmless prompts.
        weight (`float`, *optional*, defaults to `3.0`): `λ`; `0` only measures.
        answer_tokens (`int`, *optional*, defaults to `24`): Tokens of its own answer that are held, for each prompt.
            With fewer than a refusal has, a model may learn to refuse first and comply in the next sentence.
        anchors_per_step (`int`, *optional*, defaults to `4`): Anchors in each optimizer step, by turns harmful and
            benign; the same for all its micro-batches and processes.
        max_anchors (`int`, *optional*, defaults to `64`): Prompts of each kind, spread evenly over those given.
        top_k (`int`, *optional*, defaults to `256`): Most likely tokens whose probabilities are kept at each position;
            all others count as one. Vocabularies of up to 2,048 tokens are kept in full.
        system_prompt (`str`, *optional*): System turn before prompts that have none of their own: the one that
            the model will be used with.
        batch_size (`int`, *optional*, defaults to `16`): Prompts that the start answers at once.
        max_length (`int`, *optional*, defaults to `1024`): Longer prompts, in tokens, are left out and counted.
        seed (`int`, *optional*, defaults to `0`): Seed of the order in which anchors take their turns.

    Raises:
        ValueError: If a setting is out of its range, there is no prompt, the tokenizer has no chat template, or the
            PEFT configuration is prompt learning.
        FloatingPointError: If the penalty becomes infinite or NaN.

    Example:

    ```python
    >>> from safe_trainer import RefusalAnchor
    >>> RefusalAnchor(["How do I pick my neighbour's lock?"], benign_prompts=["How do I bake bread?"]).weight
    3.0

    ```

    Source: ours. Holding a model to its own answers is learning without forgetting (arXiv 1606.09282); SafeGrad (arXiv
    2508.07172) holds complete answers that are given, SBR (arXiv 2605.05995) the last hidden state of harmful prompts,
    constrained SFT (arXiv 2406.05946) the first tokens of the training rows.
    """

    name: ClassVar[str] = "Refusal anchor"
    tag: ClassVar[str] = "refusal-anchor"
    peft_support: ClassVar[PeftSupport] = "weights"
    needs_weights: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Refusal anchor",
        summary="Holds the model to the first words of its own refusals, and keeps these words from harmless prompts.",
        needs="nothing; prompts of your own make it fit your use",
        cost="a pass over four short prompts in each micro-batch; little or no task accuracy",
        avoid="the start model does not refuse, or as the only protection against harmful rows",
        fields=(FormField("weight", "Weight", 0.1, 10, 0.1, help="Higher holds answers more closely."),),
        example=lambda materials: RefusalAnchor(materials.harmful_prompts, materials.benign_prompts),
    )

    prompts: Any = field(default=None, repr=False)
    benign_prompts: Any = field(default=None, repr=False)
    weight: float = 3.0
    answer_tokens: int = 24
    anchors_per_step: int = 4
    max_anchors: int = 64
    top_k: int = 256
    system_prompt: str | None = None
    batch_size: int = 16
    max_length: int = 1024
    seed: int = 0
    _answers: OwnAnswers = field(default=OwnAnswers([], None, []), init=False, repr=False, compare=False)
    _pools: dict[str, list[Anchor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number(self, "weight", "Usual is 3.")
        check_whole(self, answer_tokens=0, anchors_per_step=1, max_anchors=1, top_k=1, batch_size=1, max_length=1)

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Let the start model answer the prompts, and keep what it would have said at each token."""
        sets = self._prompt_sets(model)
        self._answers, avoided = on_first_process(lambda: self._measured(model, tokenizer, sets))
        self._pools = {"held": self._answers.anchors, **({"avoided": avoided} if avoided else {})}
        self.provenance = {
            "prompts_sha256": {kind: own_answers.asked_sha256(found) for kind, found in sets.items()},
            "answer_tokens": self.answer_tokens,
            "system_prompt": self.system_prompt,
        }
        rest = torch.cat([anchor.log_rest.exp() for anchor in self._pools["held"] if anchor.log_rest is not None])
        logger.info(
            "RefusalAnchor holds %d answers, and keeps refusals from %d harmless prompts; tokens that are not kept "
            "have a probability of %.1e on average, %.1e at most.",
            *(len(self._pools["held"]), len(avoided), rest.mean(), rest.max()),
        )

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Report how much the start refuses: there is nothing to hold where it does not."""
        figures = self._answers.figures()
        figures["harmless_prompts_kept_from_refusals"] = float(len(self._pools.get("avoided", ())))
        warnings = self._answers.warnings()
        if "avoided" not in self._pools:
            warnings.append(
                "Nothing keeps the model from refusing harmless prompts: no refusal of its own was recognized, or "
                "`benign_prompts` is empty. Look at the over-refusal rate afterwards."
            )
        return SelfCheck(figures, (*warnings, *super().self_check(model).warnings))

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the two means over this step's anchors, in nats."""
        with torch.set_grad_enabled(self.weight > 0):
            pools = list(self._pools.values())
            costs = self._costs(model, own_answers.drawn(pools, self.step, self.anchors_per_step, self.seed))
            return {kind: torch.cat(found).mean() for kind, found in costs.items() if found}

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return both means over all anchors, in nats: near 0 where refusals and help are as they were."""
        found: dict[str, list[Tensor]] = {"held": [], "avoided": []}
        anchors = [anchor for pool in self._pools.values() for anchor in pool]
        with torch.no_grad():
            for batch in self._settings().batches(anchors):
                for kind, costs in self._costs(model, batch).items():
                    found[kind] += costs
        return {f"refusal_anchor/{kind}": torch.cat(costs).mean().item() for kind, costs in found.items() if costs}

    def _costs(self, model: nn.Module, anchors: Sequence[Anchor]) -> dict[str, list[Tensor]]:
        """Return what each anchor costs: a held one at each position (m,), one to be avoided as a whole (1,)."""
        costs: dict[str, list[Tensor]] = {"held": [], "avoided": []}
        for anchor, log_q in zip(anchors, own_answers.log_probs(model, anchors), strict=True):
            if anchor.log_probs is None:
                excess = own_answers.refusal_cost(anchor, log_q) - anchor.start_cost
                costs["avoided"].append(excess.clamp(min=0).unsqueeze(0))
            else:
                costs["held"].append(own_answers.divergence(anchor, log_q))
        return costs

    def _settings(self) -> AnswerSettings:
        return AnswerSettings(**{field.name: getattr(self, field.name) for field in fields(AnswerSettings)})

    def _prompt_sets(self, model: nn.Module) -> dict[str, PromptSet]:
        """Return the prompts of each kind; none where `benign_prompts` is empty."""
        given: dict[Kind, str] = {"harmful": "prompts", "benign": "benign_prompts"}
        sets: dict[str, PromptSet] = {}
        for kind, argument in given.items():
            source = getattr(self, argument)
            if kind == "harmful" or not isinstance(source, Sequence) or len(source):
                sets[kind] = own_answers.prompts_of(source, kind, argument, model)
        return sets

    def _measured(self, model: Any, tokenizer: Any, sets: dict[str, PromptSet]) -> tuple[OwnAnswers, list[Anchor]]:
        """Return the start's own answers, and an opening of its refusals for each harmless prompt to avoid."""
        settings = self._settings()
        harmless, _ = (
            settings.encode(model, tokenizer, sets["benign"], "benign_prompts") if "benign" in sets else ([], [])
        )
        answers = settings.measure(model, tokenizer, sets["harmful"], self.peft_config)
        openings = answers.openings
        avoided = [
            Anchor((*ids, *end[:-1]), len(end), torch.tensor(end).unsqueeze(-1), openings=len(openings))
            for ids, end in zip(harmless, cycle(openings), strict=False)
        ]
        with own_answers.as_start(model, self.peft_config):
            costs = [
                own_answers.refusal_cost(anchor, log_q).item()
                for batch in settings.batches(avoided)
                for anchor, log_q in zip(batch, own_answers.log_probs(model, batch), strict=True)
            ]
        return answers, [anchor._replace(start_cost=cost) for anchor, cost in zip(avoided, costs, strict=True)]
