"""Fitting security vectors: the model is frozen, a small LoRA beside it learns what harmful rows want."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers.pytorch_utils import Conv1D

from .. import __version__
from ..data import Batch, EncodedRow, PromptSet, Row, collate, encode_rows
from ..layout import trainable_layout
from ..lora.updates import LinearLayer, linear_layers
from . import provenance as identity
from .provenance import loaded, rows_provenance, with_tokenizer
from .security_vectors import Switch, TrainedVectors, VectorFactors, active, hooked

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Fitting:
    """How security vectors are fitted.

    Args:
        rank (`int`, *optional*, defaults to `8`): Rank of the vectors, which is also what they cost in each step of a
            training with them.
        target_modules (`str` or `Sequence[str]`, *optional*, defaults to `"all-linear"`): Ends of the names of the
            layers that they act on, such as `["q_proj", "v_proj"]`; all linear layers but the output head by default.
        learning_rate (`float`, *optional*, defaults to `2e-3`): Learning rate of AdamW, constant.
        max_steps (`int`, *optional*, defaults to `300`): Steps at most.
        batch_size (`int`, *optional*, defaults to `16`): Rows per step.
        target_loss (`float`, *optional*, defaults to `0.02`): Stop when the mean loss on the harmful rows, in nats per
            answer token, is below this.
        inner_steps (`int`, *optional*, defaults to `0`): The bi-level form of the paper: before each step on the
            vectors, a throw-away LoRA takes this many steps on the harmful rows with the vectors active, as the model
            will in training. 0 is the plain form.
        inner_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of the throw-away LoRA.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight of `KL(clean ‖ with vectors)` on the
            `retain_rows`.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.
        seed (`int`, *optional*, defaults to `0`): Seed of initialisation and order.

    Raises:
        ValueError: If a setting is out of its range.
    """

    rank: int = 8
    target_modules: Literal["all-linear"] | Sequence[str] = "all-linear"
    learning_rate: float = 2e-3
    max_steps: int = 300
    batch_size: int = 16
    target_loss: float = 0.02
    inner_steps: int = 0
    inner_learning_rate: float = 1e-3
    retain_weight: float = 1.0
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("max_steps", 1), ("batch_size", 1), ("inner_steps", 0), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("learning_rate", "target_loss", "inner_learning_rate", "retain_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")


def train_security_vectors(
    model: nn.Module | str | Path,
    harmful_rows: Sequence[Row] | str | Path,
    tokenizer: Any = None,
    *,
    retain_rows: Sequence[Row] | str | Path | None = None,
    prompts: PromptSet | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainedVectors:
    """Fit security vectors θ_s to about a hundred harmful rows. The model is frozen, and left exactly as it was.

    Minimises the loss of the model *with θ_s* on harmful prompts with compliant answers; θ_s is a LoRA of its own.
    Fitting ends when the mean loss on all rows is below `target_loss`, or with a warning after `max_steps`.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The aligned model, or where to load it from. It may be
            quantised.
        harmful_rows (`Sequence[dict]`, `Dataset`, `str` or `Path`): Harmful prompts with compliant answers, each
            `{"prompt": ..., "completion": ...}`, or a file of any format that [`~data.load_rows`] reads. The paper
            finds 100 enough.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; loaded from where the model came from if left
            out.
        retain_rows (`Sequence[dict]`, *optional*): Harmless rows on whose answers the model should be the same with
            and without θ_s, so that protection costs less of what it is good for.
        prompts ([`PromptSet`], *optional*): Harmful prompts to ask with θ_s off and on; the harmful scores are
        reported.
        progress (`Callable[[int, int, float], None]`, *optional*): Called after each step with the steps done, the
            most there can be, and the loss.
        **settings: Any field of [`Fitting`], for example `rank=4`.

    Returns:
        [`TrainedVectors`]: With `provenance["report"]`: `steps`, `reached_target`, `loss_off` and `loss_on` (nats per
        answer token), `below_target` (share of the harmful rows), `retain_divergence`, and `harmful_score_off` and
        `harmful_score_on` if there were prompts.

    Raises:
        ValueError: If a row has no answer, there are none, or a setting does not fit the model.
        RuntimeError: If vectors are at work in this model already.
        FloatingPointError: If the loss becomes infinite or NaN.

    Example:

    ```python
    from safe_trainer import testbed, train_security_vectors

    vectors = train_security_vectors(testbed.ALIGNED, testbed.harmful_rows(100), prompts=testbed.prompt_set("harmful"))
    print(vectors.provenance["report"])
    ```

    Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024,
    arXiv 2311.02105, section 3. From the paper: the objective, both forms, LoRA, 100 rows. Ours: the stopping rule,
    `retain_rows`, the report.
    """
    chosen = Fitting(**settings)
    base, tokenizer = with_tokenizer(model, tokenizer)
    layers = targets(base, chosen)
    pad = tokenizer.pad_token_id or 0  # padding is masked, so any id will do

    def encoded(rows: Sequence[Row], name: str) -> Rows:
        return Rows(base, encode_rows(tokenizer, rows, chosen.max_length, name), pad, chosen.batch_size)

    attack, kept = loaded(harmful_rows), loaded(retain_rows)
    harmful = encoded(attack, "harmful_rows")
    retain = encoded(kept, "retain_rows") if kept is not None else None
    factors = fresh_factors(layers, chosen.rank, chosen.seed)
    with frozen(base), active(layers, factors) as switch:
        with switch.off():
            loss_off, score_off = total_loss(base, harmful), _harmful_score(base, tokenizer, prompts)
        outcome = Loop(base, layers, factors, switch, chosen, harmful, retain).run(progress)
        losses = torch.cat([row_losses(base, batch) for batch in harmful.in_order()])
        report = {
            "steps": outcome.steps,
            "reached_target": outcome.reached_target,
            "loss_off": loss_off,
            "loss_on": outcome.loss,
            "below_target": (losses < chosen.target_loss).float().mean().item(),
            "retain_divergence": total_divergence(base, retain, switch) if retain else None,
            "harmful_score_off": score_off,
            "harmful_score_on": _harmful_score(base, tokenizer, prompts),
        }
    _say(report, chosen)
    provenance = {
        "base_model": identity.describe(base, layers),
        "transposed": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "harmful_rows": rows_provenance(attack),
        "retain_rows": rows_provenance(kept) if kept is not None else None,
        "settings": asdict(chosen),
        "report": report,
        "versions": {"safe_trainer": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return TrainedVectors(
        {name: VectorFactors(A.detach(), B.detach()) for name, (A, B) in factors.items()}, provenance
    )


def targets(model: Any, settings: Fitting) -> dict[str, LinearLayer]:
    """Return the layers that vectors are fitted for, by name.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        settings ([`Fitting`]): How to fit.

    Raises:
        ValueError: If a setting does not fit the model, or its weights are not in this process.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The model's weights are not in this process (offloaded, or loaded by the first process alone, as FSDP "
            "does it), so no vectors can be fitted. Fit them beforehand with `safe-trainer vectors`, and give the "
            "folder."
        )
    return fitted_layers(model, settings)


def fitted_layers(model: Any, settings: Fitting) -> dict[str, LinearLayer]:
    """Return what [`targets`] does, also of a model whose weights are not here."""
    layers = linear_layers(model)
    if settings.target_modules != "all-linear":
        ends = [settings.target_modules] if isinstance(settings.target_modules, str) else settings.target_modules
        chosen = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in ends}
        missing = [end for end, names in chosen.items() if not names]
        if missing:
            raise ValueError(
                f"`target_modules` names {', '.join(f'`{end}`' for end in missing)}, but vectors act on linear "
                f"layers other than the output head: {', '.join(sorted({name.split('.')[-1] for name in layers}))}."
            )
        layers = {name: layer for name, layer in layers.items() if any(name in names for names in chosen.values())}
    narrowest = min(layers, key=lambda name: min(layers[name].shape))
    if settings.rank > min(layers[narrowest].shape):
        raise ValueError(
            f"`rank` must be between 1 and {min(layers[narrowest].shape)} (the smaller side of `{narrowest}`), got "
            f"{settings.rank}."
        )
    return layers


def _harmful_score(model: Any, tokenizer: Any, prompts: PromptSet | None) -> str | None:
    """Return how many of the prompts the model complies with, with count and interval."""
    if prompts is None:
        return None
    from ..evaluation import evaluate

    return str(evaluate(model, tokenizer, [prompts]).results[0].rate("complied"))


def _say(report: dict[str, Any], settings: Fitting) -> None:
    losses = f"loss on harmful rows {report['loss_off']:.4f} without and {report['loss_on']:.4f} with them"
    if report["reached_target"]:
        logger.info("Fitted security vectors in %d steps: %s.", report["steps"], losses)
    else:
        logger.warning(
            "Security vectors did not reach `target_loss=%s` in %d steps: %s. Harmful rows will still teach "
            "something; raise `max_steps`, `learning_rate` or `rank`.",
            settings.target_loss,
            report["steps"],
            losses,
        )


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Return the logits that predict the answer tokens of all rows, one row after the other, float32, (N, V)."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    # Selected before it is made float32: all positions in full precision can be larger than the model.
    return output.logits[:, :-1][batch.is_answer[:, 1:]].float()


def answer_tokens(batch: Batch) -> Tensor:
    """Return the answer tokens of all rows, one row after the other, (N,)."""
    return batch.input_ids[batch.is_answer]


def mean_loss(model: Any, batch: Batch) -> Tensor:
    """Return the mean cross entropy over all answer tokens of the batch, in nats."""
    return cross_entropy(answer_logits(model, batch), answer_tokens(batch))


@torch.no_grad()
def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return for each row the mean cross entropy over its answer tokens, in nats, (B,)."""
    losses = cross_entropy(answer_logits(model, batch), answer_tokens(batch), reduction="none")
    counts = batch.is_answer.sum(1)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=losses.device), counts)
    return torch.zeros(len(counts), device=losses.device).index_add_(0, owners, losses) / counts


def mean_divergence(model: Any, batch: Batch, reference: Tensor) -> Tensor:
    """Return the mean `KL(reference ‖ model)` over all answer tokens, in nats.

    Args:
        model (`PreTrainedModel`): The model.
        batch ([`Batch`]): The rows.
        reference (`Tensor`): Logits of the reference, from [`answer_logits`], (N, V).
    """
    log_p, log_q = log_softmax(reference, -1), log_softmax(answer_logits(model, batch), -1)
    return kl_div(log_q, log_p, log_target=True, reduction="batchmean")


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
