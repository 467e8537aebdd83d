"""RefusalAnchor: hold the model to the first words of its own refusals, and keep these words from harmless prompts."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data import Kind, PromptSet, as_prompts
from ..data.protection import protection_prompts
from ..distributed import on_first_process
from ..evaluation import Decoding, PhraseJudge
from ..evaluation.generate import generate_from
from ..evaluation.prompting import left_padded, render, tokenize
from ..evaluation.thinking import is_open
from ..lora.modes import evaluation_mode, without_adapters
from .base import FormField, MethodCard, PenaltyMethod, SelfCheck, check_no_virtual_tokens, check_number, check_whole

logger = logging.getLogger(__name__)

_FEW_REFUSALS = 0.8  # share of harmful prompts refused at the start below which there is little to hold
_SMALL_VOCABULARY = 2048
_OPENING_TOKENS, _OPENINGS = 5, 8  # length of openings of refusals, and how many of the most frequent are avoided
_POOLS = {"held": "harmful_prompts_held", "avoided": "harmless_prompts_kept_from_refusals"}
_CHECK_TOKENS = 24  # of answers that the start is judged by: a refusal is not recognized by its first tokens alone


class Anchor(NamedTuple):
    """A prompt with the first tokens of an answer, to be held (with the start's distribution) or to be avoided."""

    ids: tuple[int, ...]  # of the prompt and of the answer
    positions: int  # how many at the end of `ids` count (m), the first being the prompt's last token
    tokens: Tensor = torch.empty(0)  # (m, k): the k most likely next tokens; or (m, 1): the answer to be avoided
    log_probs: Tensor | None = None  # theirs at the start, (m, k)
    log_rest: Tensor | None = None  # log of the probability of all others, (m,)
    openings: int = 1  # how many openings one that is to be avoided stands for


@dataclass
class RefusalAnchor(PenaltyMethod):
    """Adds `λ · (mean KL(π_start(· | x, y_<t) ‖ π_θ(· | x, y_<t)) + mean Σ −log(1 − π_θ(r | z)))` to the loss.

    The first mean is over harmful prompts `x` and the first tokens `y` of the answers that the model gives *before*
    fine-tuning: what it would say there is computed once, and fine-tuning pays for saying something else. The second
    is the counterweight, so that the model does not learn to refuse everything: over benign prompts `z` it pays for
    the openings `r` of the model's own refusals. No harmful answers and no second model are needed.

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
        weight (`float`, *optional*, defaults to `1.0`): `λ`; `0` only measures.
        answer_tokens (`int`, *optional*, defaults to `8`): Tokens of its own answer that are held, for each prompt.
        anchors_per_step (`int`, *optional*, defaults to `4`): Anchors in each optimizer step, by turns harmful and
            benign; the same for all its micro-batches and processes.
        max_anchors (`int`, *optional*, defaults to `64`): Prompts of each kind, spread evenly over those given.
        top_k (`int`, *optional*, defaults to `256`): Most likely tokens whose probabilities are kept at each position;
            all others count as one. Vocabularies of up to 2,048 tokens are kept whole.
        system_prompt (`str`, *optional*): System turn before each anchor: the one that the model will be used with.
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
    1.0

    ```

    Source: ours. Holding a model to its own answers is learning without forgetting (arXiv 1606.09282); SafeGrad (arXiv
    2508.07172) holds the whole of given safe answers, SBR (arXiv 2605.05995) the last hidden state of harmful prompts,
    constrained SFT (arXiv 2406.05946) the first tokens of the training rows.
    """

    name: ClassVar[str] = "Refusal anchor"
    tag: ClassVar[str] = "refusal-anchor"
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
    weight: float = 1.0
    answer_tokens: int = 8
    anchors_per_step: int = 4
    max_anchors: int = 64
    top_k: int = 256
    system_prompt: str | None = None
    batch_size: int = 16
    max_length: int = 1024
    seed: int = 0
    _pools: dict[str, list[Anchor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _refused: float | None = field(default=None, init=False, repr=False, compare=False)
    _continues: bool = field(default=False, init=False, repr=False, compare=False)
    _pad: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number(self, "weight", "Usual is 1.")
        check_whole(self, answer_tokens=0, anchors_per_step=1, max_anchors=1, top_k=1, batch_size=1, max_length=1)

    def adapt_peft_config(self, config: Any) -> Any:
        """Refuse prompt learning; change nothing."""
        check_no_virtual_tokens(self, config)
        self._continues = config is None
        return config

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Let the start model answer the prompts, and keep what it would have said at each token."""
        self._pad = tokenizer.pad_token_id or 0
        sets = self._prompt_sets(getattr(model.config, "_name_or_path", ""))
        self._pools, self._refused = on_first_process(lambda: self._measured(model, tokenizer, sets))
        self.provenance = {
            "prompts_sha256": {kind: _sha256(found.prompts) for kind, found in sets.items()},
            "answer_tokens": self.answer_tokens,
            "system_prompt": self.system_prompt,
        }
        rest = torch.cat([anchor.log_rest.exp() for anchor in self._pools["held"] if anchor.log_rest is not None])
        logger.info(
            "RefusalAnchor holds %d answers, and keeps refusals from %d harmless prompts; tokens that are not kept "
            "have a probability of %.1e on average, %.1e at most.",
            *(len(self._pools["held"]), len(self._pools.get("avoided", ())), rest.mean(), rest.max()),
        )

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Report how much the start refuses: there is nothing to hold where it does not."""
        figures = {name: float(len(self._pools.get(kind, ()))) for kind, name in _POOLS.items()}
        warnings = []
        if self._refused is None:
            warnings.append(
                "Whether the start refuses cannot be told from its answers: they begin with a thought, or are in a "
                "language that the judge does not know. They are held as they are."
            )
        else:
            figures["harmful_prompts_refused_at_start"] = self._refused
            if self._refused < _FEW_REFUSALS:
                warnings.append(
                    f"Before fine-tuning the model refuses only {self._refused:.0%} of the harmful prompts, by the "
                    f"first {_CHECK_TOKENS} tokens of its answers. RefusalAnchor holds what the model does, those "
                    "answers too. Start from an aligned model, or give `prompts` that it refuses."
                )
        if "avoided" not in self._pools:
            warnings.append(
                "Nothing keeps the model from refusing harmless prompts: no refusal of its own was recognized, or "
                "`benign_prompts` is empty. Look at the over-refusal rate afterwards."
            )
        return SelfCheck(figures, (*warnings, *super().self_check(model).warnings))

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the two means over this step's anchors, in nats."""
        with torch.set_grad_enabled(self.weight > 0):
            costs = self._costs(model, self._drawn(self.step))
            return {kind: torch.cat(found).mean() for kind, found in costs.items() if found}

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return both means over all anchors, in nats: near 0 where refusals and help are as they were."""
        found: dict[str, list[Tensor]] = {"held": [], "avoided": []}
        anchors = [anchor for pool in self._pools.values() for anchor in pool]
        with torch.no_grad():
            for batch in self._batches(anchors):
                for kind, costs in self._costs(model, batch).items():
                    found[kind] += costs
        return {f"refusal_anchor/{kind}": torch.cat(costs).mean().item() for kind, costs in found.items() if costs}

    def _drawn(self, step: int) -> list[Anchor]:
        """Return a step's anchors: the kinds take turns, and each is gone through in a new order every time."""
        pools = list(self._pools.values())
        drawn = []
        for turn in range(step * self.anchors_per_step, (step + 1) * self.anchors_per_step):
            place, kind = divmod(turn, len(pools))
            epoch, index = divmod(place, len(pools[kind]))
            drawn.append(pools[kind][_order(len(pools[kind]), self.seed, kind, epoch)[index]])
        return drawn

    def _costs(self, model: nn.Module, anchors: Sequence[Anchor]) -> dict[str, list[Tensor]]:
        """Return what each anchor costs: a held one at each position (m,), one to be avoided as a whole (1,)."""
        logits = _logits(model, anchors, self._pad)  # (anchors, most positions, vocabulary)
        costs: dict[str, list[Tensor]] = {"held": [], "avoided": []}
        for row, anchor in zip(logits, anchors, strict=True):
            log_q = row[logits.shape[1] - anchor.positions :].float().log_softmax(-1)
            tokens = anchor.tokens.to(log_q.device)
            log_q_kept = log_q.gather(-1, tokens)
            if anchor.log_probs is None or anchor.log_rest is None:
                # Below 1, so that the cost of a refusal that has become certain is finite.
                cost = -torch.log1p(-log_q_kept.sum().exp().clamp(max=1 - 1e-6))
                costs["avoided"].append(anchor.openings * cost.unsqueeze(0))
                continue
            log_p, log_p_rest = anchor.log_probs.to(log_q.device), anchor.log_rest.to(log_q.device)
            divergence = (log_p.exp() * (log_p - log_q_kept)).sum(-1)
            if tokens.shape[-1] < log_q.shape[-1]:
                log_q_rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
                divergence = divergence + log_p_rest.exp() * (log_p_rest - log_q_rest)
            costs["held"].append(divergence)
        return costs

    def _prompt_sets(self, model: str) -> dict[str, PromptSet]:
        """Return the prompts of each kind: those given, those that the model brings along, or built-in ones."""
        given: dict[Kind, str] = {"harmful": "prompts", "benign": "benign_prompts"}
        sets: dict[str, PromptSet] = {}
        for kind, argument in given.items():
            source = getattr(self, argument)
            if source is None:
                sets[kind] = protection_prompts(kind, model)
            elif kind == "harmful" or not isinstance(source, Sequence) or len(source):
                sets[kind] = as_prompts(source, kind, argument=argument)
        return sets

    def _measured(
        self, model: Any, tokenizer: Any, sets: Mapping[str, PromptSet]
    ) -> tuple[dict[str, list[Anchor]], float | None]:
        """Return the anchors of each kind, and the share of harmful prompts that the start refuses, if that shows."""
        decoding = Decoding(max_new_tokens=max(self.answer_tokens, _CHECK_TOKENS), batch_size=self.batch_size)
        prompts, opened = self._encoded(model, tokenizer, sets["harmful"])
        harmless, _ = self._encoded(model, tokenizer, sets["benign"]) if "benign" in sets else ([], [])
        # The start is the model without the adapter, unless it came with one.
        with nullcontext() if self._continues else without_adapters(model), torch.no_grad():
            answers = generate_from(model, tokenizer, prompts, decoding, opened=opened)
            own = [answer.tokens[: self.answer_tokens] for answer in answers]
            held = [Anchor((*ids, *tokens), 1 + len(tokens)) for ids, tokens in zip(prompts, own, strict=True)]
            pools = {"held": [a for batch in self._batches(held) for a in self._with_reference(model, batch)]}
        verdicts = PhraseJudge()([""] * len(answers), [a.text for a in answers])
        # Of an answer that begins with a thought, nothing is to be learned about how refusals open.
        shown = [
            (verdict, answer)
            for verdict, answer in zip(verdicts, answers, strict=True)
            if verdict is not None and not answer.thought and not answer.unfinished_thought
        ]
        refusals = Counter(answer.tokens[:_OPENING_TOKENS] for verdict, answer in shown if verdict == "refused")
        openings = [opening for opening, _ in refusals.most_common(_OPENINGS) if opening]
        if harmless and openings:
            pools["avoided"] = [
                Anchor((*ids, *end[:-1]), len(end), torch.tensor(end).unsqueeze(-1), openings=len(openings))
                for ids, end in zip(harmless, cycle(openings), strict=False)
            ]
        return pools, refusals.total() / len(shown) if shown else None

    def _encoded(self, model: Any, tokenizer: Any, prompts: PromptSet) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of the prompts to use, and whether the chat template opens a thought after each."""
        texts = render(tokenizer, prompts.prompts, self.system_prompt)
        encoded = tokenize(model, tokenizer, texts)
        places = self._fitting(model, encoded, "prompts" if prompts.kind == "harmful" else "benign_prompts")
        return [encoded[place] for place in places], [is_open(texts[place]) for place in places]

    def _fitting(self, model: Any, encoded: Sequence[list[int]], argument: str) -> list[int]:
        """Return the places of at most `max_anchors` prompts that are not too long, spread evenly over all of them."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        longest = min(self.max_length, context - max(self.answer_tokens, _CHECK_TOKENS))
        fitting = [place for place, ids in enumerate(encoded) if len(ids) <= longest]
        if not fitting:
            raise ValueError(
                f"`{argument}` has no prompt of at most {longest} tokens: the shortest of {len(encoded)} has "
                f"{min(map(len, encoded))}. Give shorter prompts, or raise `max_length` as far as the model's context "
                "allows."
            )
        if len(fitting) < len(encoded):
            logger.warning(
                "%d of %d `%s` have more than %d tokens and are left out.",
                *(len(encoded) - len(fitting), len(encoded), argument, longest),
            )
        kept = min(self.max_anchors, len(fitting))
        return [fitting[place * len(fitting) // kept] for place in range(kept)]

    def _batches(self, anchors: Sequence[Anchor]) -> list[Sequence[Anchor]]:
        return [anchors[start : start + self.batch_size] for start in range(0, len(anchors), self.batch_size)]

    def _with_reference(self, model: Any, anchors: Sequence[Anchor]) -> Iterator[Anchor]:
        """Yield anchors with what the model, as it is, says at their positions."""
        logits = _logits(model, anchors, self._pad)
        for row, anchor in zip(logits, anchors, strict=True):
            log_p = row[logits.shape[1] - anchor.positions :].float().log_softmax(-1)
            vocabulary = log_p.shape[-1]
            k = vocabulary if vocabulary <= _SMALL_VOCABULARY else min(self.top_k, vocabulary)
            kept, tokens = log_p.topk(k)
            rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
            yield anchor._replace(tokens=tokens.cpu(), log_probs=kept.cpu(), log_rest=rest.cpu())


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@lru_cache(maxsize=16)
def _order(size: int, seed: int, kind: int, epoch: int) -> tuple[int, ...]:
    """Return a random order of `size` anchors, from a generator of its own."""
    generator = torch.Generator().manual_seed((seed * 1009 + kind) * 1_000_003 + epoch)
    return tuple(torch.randperm(size, generator=generator).tolist())


def _logits(model: Any, anchors: Sequence[Anchor], pad: int) -> Tensor:
    """Return the logits at the last positions of each anchor, (anchors, m, vocabulary), m the most that one holds."""
    kept = max(anchor.positions for anchor in anchors)
    inputs: dict[str, Any] = {**left_padded([anchor.ids for anchor in anchors], model.device, pad)}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    with evaluation_mode(model):
        return model(**inputs, use_cache=False).logits[:, -kept:]
