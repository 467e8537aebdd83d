"""The loop that fits security vectors: a frozen model, hooked factors, plain or bi-level steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.encoding import Batch, EncodedRow, collate
from ...layout import trainable_layout
from ...lora.updates import LinearLayer
from .hooks import Switch, VectorFactors, hooked
from .losses import answer_logits, answer_tokens, mean_divergence, mean_loss

if TYPE_CHECKING:
    from .fitting import Fitting


class Outcome(NamedTuple):
    """How fitting ended."""

    steps: int
    loss: float
    """Mean loss over all harmful rows with the vectors active, in nats per answer token."""
    reached_target: bool


class Rows:
    """Encoded rows that come in batches on the model's device."""

    def __init__(self, model: Any, encoded: Sequence[EncodedRow], pad_token_id: int, batch_size: int) -> None:
        self.encoded, self.pad_token_id, self.batch_size = encoded, pad_token_id, batch_size
        self.device = model.get_input_embeddings().weight.device

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return math.ceil(len(self.encoded) / self.batch_size)

    def in_order(self) -> Iterator[Batch]:
        """Yield every row once."""
        return self._batches(self.encoded)

    def endless(self, seed: int) -> Iterator[Batch]:
        """Yield passes without end, each in an order of its own."""
        shuffled, rng = list(self.encoded), random.Random(seed)
        while True:
            rng.shuffle(shuffled)
            yield from self._batches(shuffled)

    def _batches(self, rows: Sequence[EncodedRow]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.batch_size):
            yield collate(rows[start : start + self.batch_size], self.pad_token_id, self.device)


@torch.no_grad()
def total_loss(model: Any, rows: Rows) -> float:
    """Return the mean loss over the answer tokens of all rows, in nats."""
    summed, count = 0.0, 0
    for batch in rows.in_order():
        tokens = answer_tokens(batch)
        summed += cross_entropy(answer_logits(model, batch), tokens, reduction="sum").item()
        count += len(tokens)
    return summed / count


@torch.no_grad()
def total_divergence(model: Any, rows: Rows, switch: Switch) -> float:
    """Return the mean `KL(clean ‖ with vectors)` over the answer tokens of all rows, in nats."""
    summed, count = 0.0, 0
    for batch in rows.in_order():
        tokens = int(batch.is_answer.sum())
        summed += tokens * divergence(model, batch, switch).item()
        count += tokens
    return summed / count


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let a model neither learn nor drop out for a while; afterwards everything is as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        model.requires_grad_(False)
        model.eval()
        with trainable_layout(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:  # one by one, since part of a model may be in evaluation mode on purpose
            module.training = True


def fresh_factors(layers: Mapping[str, LinearLayer], rank: int, seed: int) -> dict[str, VectorFactors]:
    """Return factors as LoRA begins with them, `A` uniform and `B` zero, float32, ready to learn."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in layers.items():
        d_out, d_in = layer.shape
        A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
        device = next(layer.base.parameters()).device
        factors[name] = VectorFactors(A.to(device), torch.zeros(d_out, rank, device=device))
    for tensor in leaves(factors):
        tensor.requires_grad_(True)
    return factors


class ThrowAway:
    """A copy of what will be trained later, as a LoRA that moves with the vectors active and is then thrown away."""

    def __init__(self, model: Any, layers: Mapping[str, LinearLayer], settings: Fitting) -> None:
        self.model, self.layers, self.settings = model, layers, settings
        self.switch = Switch()
        self.factors = fresh_factors(layers, settings.rank, settings.seed + 1)
        self.renew()

    def renew(self) -> None:
        """Begin again where the model is."""
        with torch.no_grad():
            for factors in self.factors.values():
                factors.B.zero_()
        self.optimizer = torch.optim.AdamW(leaves(self.factors), lr=self.settings.inner_learning_rate)

    def advance(self, batches: Iterator[Batch]) -> None:
        """Take the inner steps."""
        for _ in range(self.settings.inner_steps):
            step(mean_loss(self.model, next(batches)), self.optimizer)


@dataclass
class Loop:
    """One fitting.

    Args:
        model (`PreTrainedModel`): Frozen, with `factors` at work in it.
        layers (`Mapping[str, LinearLayer]`): The layers that the vectors act on.
        factors (`Mapping[str, VectorFactors]`): The vectors, which learn.
        switch ([`Switch`]): Turns them off.
        settings ([`Fitting`]): How to fit.
        harmful ([`Rows`]): What they should make likely.
        retain ([`Rows`], *optional*): Where they should change nothing.
    """

    model: Any
    layers: Mapping[str, LinearLayer]
    factors: Mapping[str, VectorFactors]
    switch: Switch
    settings: Fitting
    harmful: Rows
    retain: Rows | None

    def run(self, progress: Callable[[int, int, float], None] | None) -> Outcome:
        """Fit until the loss on all harmful rows, looked at after each pass, is below the target."""
        settings = self.settings
        optimizer = torch.optim.AdamW(leaves(self.factors), lr=settings.learning_rate, weight_decay=0.0)
        batches = self.harmful.endless(settings.seed)
        kept = self.retain.endless(settings.seed) if self.retain else None
        with self._throw_away() as copy:
            for number in range(1, settings.max_steps + 1):
                if copy is not None:
                    copy.advance(batches)
                loss = mean_loss(self.model, next(batches))
                retained = settings.retain_weight * divergence(self.model, next(kept), self.switch) if kept else 0
                step(loss + retained, optimizer)
                if progress is not None:
                    progress(number, settings.max_steps, loss.item())
                if number % len(self.harmful) == 0 or number == settings.max_steps:
                    total = self._loss_without(copy)
                    if total < settings.target_loss:
                        break
        return Outcome(number, total, total < settings.target_loss)

    @contextmanager
    def _throw_away(self) -> Iterator[ThrowAway | None]:
        if self.settings.inner_steps == 0:
            yield None
            return
        copy = ThrowAway(self.model, self.layers, self.settings)
        with hooked(self.layers, copy.factors, copy.switch):
            yield copy

    def _loss_without(self, copy: ThrowAway | None) -> float:
        if copy is None:
            return total_loss(self.model, self.harmful)
        with copy.switch.off():
            total = total_loss(self.model, self.harmful)
        copy.renew()
        return total


def leaves(factors: Mapping[str, VectorFactors]) -> list[Tensor]:
    """Return all factors as a list of tensors."""
    return [tensor for pair in factors.values() for tensor in pair]


def divergence(model: Any, batch: Batch, switch: Switch) -> Tensor:
    """Return the mean `KL(clean ‖ with vectors)` over the answer tokens of a batch, in nats."""
    with switch.off(), torch.no_grad():
        clean = answer_logits(model, batch)
    return mean_divergence(model, batch, clean)


def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step on what the optimizer holds, and on nothing else that the loss depends on.

    Raises:
        FloatingPointError: If the loss is infinite or NaN.
    """
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"The loss became {loss.item()} while security vectors were fitted. The model is as it was; try again "
            "with a lower `learning_rate`, or with the model in bfloat16 or float32."
        )
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
