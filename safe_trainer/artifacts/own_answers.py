"""A model's own answers: their first tokens, and what it would have said at each of them, to hold it to later."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from torch import Tensor

from ..data import Kind, PromptSet, as_prompts
from ..data.protection import protection_prompts
from ..data.thinking import is_open
from ..evaluation import Decoding, PhraseJudge
from ..evaluation.generate import generate_from
from ..evaluation.prompting import left_padded, render, tokenize
from ..lora.loading import revision_of, source_of
from ..lora.modes import accepted_inputs, evaluation_mode, input_device, without_adapters
from ..lora.updates import changes_base

logger = logging.getLogger(__name__)

_FEW_REFUSALS = 0.8  # share of harmful prompts refused at the start below which there is little to hold
_SMALL_VOCABULARY = 2048
_OPENINGS = 8  # how many of the most frequent openings of refusals are kept
_CHECK_TOKENS = 24  # of answers that the start is judged by: a refusal is not recognized by its first tokens alone


class Anchor(NamedTuple):
    """A prompt with the first tokens of an answer, to be held (with the start's distribution) or to be avoided."""

    ids: tuple[int, ...]  # of the prompt and of the answer
    positions: int  # how many at the end of `ids` count (m), the first being the prompt's last token
    tokens: Tensor = torch.empty(0)  # (m, k): the k most likely next tokens; or (m, 1): the answer to be avoided
    log_probs: Tensor | None = None  # theirs at the start, (m, k)
    log_rest: Tensor | None = None  # log of the probability of all others, (m,)
    openings: int = 1  # how many openings one that is to be avoided stands for
    start_cost: float = 0.0  # what that one costs at the start, in nats


class OwnAnswers(NamedTuple):
    """What a model answers to harmful prompts: an anchor for each, and whether these are refusals."""

    anchors: list[Anchor]
    refused: float | None  # share of the answers; `None` if they do not show it
    openings: list[tuple[int, ...]]  # the fewest first tokens that show a refusal, the most frequent first

    def figures(self) -> dict[str, float]:
        """Return what a method's self-check reports of them."""
        refused = {} if self.refused is None else {"harmful_prompts_refused_at_start": self.refused}
        return {"harmful_prompts_held": float(len(self.anchors)), **refused}

    def few_refusals(self) -> str:
        """Return a warning if the start refuses too few prompts for protection to matter, or an empty text."""
        if self.refused is None or self.refused >= _FEW_REFUSALS:
            return ""
        return (
            f"Before fine-tuning the model refuses only {self.refused:.0%} of the harmful prompts, by the first "
            f"{_CHECK_TOKENS} tokens of its answers."
        )

    def warnings(self) -> list[str]:
        """Return why holding these answers may protect nothing."""
        if self.refused is None:
            return [
                "The start's answers do not show whether it refuses: they begin with a thought, or are in a "
                "language that the judge does not know. They are held as they are."
            ]
        advice = "Start from an aligned model, or give `prompts` that it refuses."
        few = self.few_refusals()
        return [f"{few} What the model does is held, those answers too. {advice}"] if few else []


@dataclass(frozen=True)
class AnswerSettings:
    """How own answers are taken; the fields are those of [`RefusalAnchor`]."""

    answer_tokens: int = 24
    max_anchors: int = 64
    top_k: int = 256
    system_prompt: str | None = None
    batch_size: int = 16
    max_length: int = 1024

    def measure(self, model: Any, tokenizer: Any, prompts: PromptSet, config: PeftConfig | None) -> OwnAnswers:
        """Let the start model answer harmful prompts, and keep what it would have said at each token.

        The trainer has wrapped it with `config`. Without one, the start is the model with the adapter that it came
        with.
        """
        decoding = Decoding(max_new_tokens=max(self.answer_tokens, _CHECK_TOKENS), batch_size=self.batch_size)
        encoded, opened = self.encode(model, tokenizer, prompts, "prompts")
        with as_start(model, config):
            answers = generate_from(model, tokenizer, encoded, decoding, opened=opened)
            own = [answer.tokens[: self.answer_tokens] for answer in answers]
            held = [Anchor((*ids, *tokens), 1 + len(tokens)) for ids, tokens in zip(encoded, own, strict=True)]
            anchors = [a for batch in self.batches(held) for a in self._with_reference(model, batch)]
        verdicts = PhraseJudge()([""] * len(answers), [answer.text for answer in answers])
        # Of an answer that begins with a thought, nothing is to be learned about how refusals open.
        shown = [
            (verdict, answer)
            for verdict, answer in zip(verdicts, answers, strict=True)
            if verdict is not None and not answer.thought and not answer.unfinished_thought
        ]
        refusals = Counter(_opening(tokenizer, answer.tokens) for verdict, answer in shown if verdict == "refused")
        openings = [opening for opening, _ in refusals.most_common(_OPENINGS) if opening]
        return OwnAnswers(anchors, refusals.total() / len(shown) if shown else None, openings)

    def encode(
        self, model: Any, tokenizer: Any, prompts: PromptSet, argument: str
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of the prompts to use, and whether the chat template opens a thought after each."""
        texts = render(tokenizer, prompts.conversations(), self.system_prompt)
        encoded = tokenize(model, tokenizer, texts)
        places = self._fitting(model, encoded, argument)
        return [encoded[place] for place in places], [is_open(texts[place]) for place in places]

    def batches(self, anchors: Sequence[Anchor]) -> list[Sequence[Anchor]]:
        """Return anchors in groups of `batch_size`."""
        return [anchors[start : start + self.batch_size] for start in range(0, len(anchors), self.batch_size)]

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

    def _with_reference(self, model: Any, anchors: Sequence[Anchor]) -> Iterator[Anchor]:
        """Yield anchors with what the model says at their positions now."""
        for anchor, log_p in zip(anchors, log_probs(model, anchors), strict=True):
            vocabulary = log_p.shape[-1]
            k = vocabulary if vocabulary <= _SMALL_VOCABULARY else min(self.top_k, vocabulary)
            kept, tokens = log_p.topk(k)
            rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
            yield anchor._replace(tokens=tokens.cpu(), log_probs=kept.cpu(), log_rest=rest.cpu())


def prompts_of(source: Any, kind: Kind, argument: str, model: Any) -> PromptSet:
    """Return the prompts given as an argument; without, those that the model brings along, or built-in ones."""
    if source is None:
        return protection_prompts(kind, source_of(model), revision_of(model))
    return as_prompts(source, kind, argument=argument)


@contextmanager
def as_start(model: Any, config: PeftConfig | None) -> Iterator[None]:
    """Let the model be what it was before training, without gradients; `config` is what the trainer wrapped it in."""
    is_start = config is None or changes_base(config)  # without the adapter it would be another model
    with nullcontext() if is_start else without_adapters(model), torch.no_grad():
        yield


def log_probs(model: Any, anchors: Sequence[Anchor]) -> list[Tensor]:
    """Return the model's log-probabilities of all tokens at each anchor's positions, (m, vocabulary).

    The pass runs in evaluation mode: without dropout and security vectors, and without drawing random numbers.
    """
    kept = max(anchor.positions for anchor in anchors)
    inputs = left_padded([anchor.ids for anchor in anchors], input_device(model))
    with evaluation_mode(model):
        read = model(**accepted_inputs(model, **inputs, use_cache=False, logits_to_keep=kept))
    logits = read.logits[:, -kept:]
    return [row[kept - a.positions :].float().log_softmax(-1) for row, a in zip(logits, anchors, strict=True)]


def divergence(anchor: Anchor, log_q: Tensor) -> Tensor:
    """Return `KL(start ‖ model)` at each of an anchor's positions, (m,), in nats; tokens that are not kept are one."""
    assert anchor.log_probs is not None and anchor.log_rest is not None
    tokens, log_p, log_p_rest = (t.to(log_q.device) for t in (anchor.tokens, anchor.log_probs, anchor.log_rest))
    found = (log_p.exp() * (log_p - log_q.gather(-1, tokens))).sum(-1)
    if tokens.shape[-1] < log_q.shape[-1]:
        log_q_rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        found = found + log_p_rest.exp() * (log_p_rest - log_q_rest)
    return found


def refusal_cost(anchor: Anchor, log_q: Tensor) -> Tensor:
    """Return `−log(1 − p)` of the opening that an anchor is to avoid, times the openings it stands for; in nats."""
    chance = log_q.gather(-1, anchor.tokens.to(log_q.device)).sum().exp()
    # Below 1, so that the cost of a refusal that has become certain is finite.
    return -anchor.openings * torch.log1p(-chance.clamp(max=1 - 1e-6))


def drawn(pools: Sequence[Sequence[Anchor]], step: int, count: int, seed: int) -> list[Anchor]:
    """Return a step's anchors: the pools alternate, and each is reshuffled for every pass through it."""
    found = []
    for turn in range(step * count, (step + 1) * count):
        place, kind = divmod(turn, len(pools))
        epoch, index = divmod(place, len(pools[kind]))
        found.append(pools[kind][_order(len(pools[kind]), seed, kind, epoch)[index]])
    return found


def asked_sha256(prompts: PromptSet) -> str:
    """Return a SHA-256 of what is asked: of single turns as they are, as in earlier versions."""
    asked = prompts.conversations()
    texts = [turns[0]["content"] if len(turns) == 1 else json.dumps(turns, ensure_ascii=False) for turns in asked]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _opening(tokenizer: Any, refusal: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first tokens of a refusal, as few as show that it is one.

    More would leave a way around them: kept from "I can't help", a model learned to say "I can't you want".
    """
    texts = [tokenizer.decode(refusal[:count], skip_special_tokens=True) for count in range(1, len(refusal) + 1)]
    verdicts = PhraseJudge()([""] * len(texts), texts)
    return refusal[: verdicts.index("refused") + 1] if "refused" in verdicts else refusal


@lru_cache(maxsize=16)
def _order(size: int, seed: int, kind: int, epoch: int) -> tuple[int, ...]:
    """Return a random order of `size` anchors, from a separate generator."""
    generator = torch.Generator().manual_seed((seed * 1009 + kind) * 1_000_003 + epoch)
    return tuple(torch.randperm(size, generator=generator).tolist())
