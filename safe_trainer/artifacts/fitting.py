"""Fitting security vectors: the model is frozen, and a small LoRA in hooks learns the harmful rows.

The loop is our own and not TRL's trainer, because vectors are fitted while another trainer is being built: by its
first process alone, on its model, which may be quantized or hold any adapter, and which must come out untouched.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers.pytorch_utils import Conv1D

from ..data import Batch, EncodedRow, PromptSet, as_rows, collate, encode_rows, rows_sha256, without_harmful
from ..lora.modes import accepted_inputs, input_device
from ..lora.updates import LinearLayer, linear_layers
from .calibration import measuring
from .provenance import describe, model_and_tokenizer, stamp
from .security_vectors import Switch, TrainedVectors, VectorFactors, active, check_harmful_rows, hooked

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]
_LOWEST_TARGET = 0.02  # nats per token; a loss below teaches nothing whatever the start was
_TIMED = 3  # steps after which the time that fitting takes is estimated
_LATEST, _NEAR = 3, 3  # batches whose mean loss must be within this factor of the target before all rows are asked


@dataclass(frozen=True)
class Fitting:
    """How security vectors are fitted.

    Args:
        rank (`int`, *optional*, defaults to `8`): Rank of the vectors; each step of a training with them pays for it.
        target_modules (`str` or `Sequence[str]`, *optional*, defaults to `"all-linear"`): Ends of the names of the
            layers that they act on, such as `["q_proj", "v_proj"]`; all linear layers but the output head by default.
        learning_rate (`float`, *optional*, defaults to `2e-3`): Learning rate of AdamW, constant.
        max_passes (`int`, *optional*, defaults to `20`): Passes over the harmful rows at most.
        max_steps (`int`, *optional*): Steps at most, in place of `max_passes`.
        batch_size (`int`, *optional*, defaults to `16`): Rows per step.
        relative_target (`float`, *optional*, defaults to `0.04`): Stop when the mean loss on the harmful rows is below
            this share of the loss without vectors (or below 0.02 nats per answer token).
        target_loss (`float`, *optional*): Stop below this loss instead, in nats per answer token.
        inner_steps (`int`, *optional*, defaults to `0`): The paper's bi-level form: before each step on the vectors, a
            throw-away LoRA takes this many on the harmful rows, as the model will in training. 0 is the plain form.
        inner_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of the throw-away LoRA.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight of `KL(clean ‖ with vectors)` on `retain_data`.
        max_length (`int`, *optional*, defaults to `1024`): Tokens of a row that are read, from its beginning.
        seed (`int`, *optional*, defaults to `0`): Seed of initialization and order.

    Raises:
        ValueError: If a setting is out of its range.
    """

    rank: int = 8
    target_modules: Literal["all-linear"] | Sequence[str] = "all-linear"
    learning_rate: float = 2e-3
    max_passes: int = 20
    max_steps: int | None = None
    batch_size: int = 16
    relative_target: float = 0.04
    target_loss: float | None = None
    inner_steps: int = 0
    inner_learning_rate: float = 1e-3
    retain_weight: float = 1.0
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"rank": 1, "max_passes": 1, "max_steps": 1, "batch_size": 1, "inner_steps": 0, "max_length": 2}
        for name, smallest in least.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")
        for name in ("learning_rate", "relative_target", "target_loss", "inner_learning_rate", "retain_weight"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.relative_target >= 1:
            raise ValueError(f"`relative_target` must be below 1, got {self.relative_target}. The default is 0.04.")


def train_security_vectors(
    model: nn.Module | str | Path,
    harmful_data: Any,
    tokenizer: Any = None,
    *,
    retain_data: Any = None,
    prompts: PromptSet | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainedVectors:
    """Fit security vectors θ_s to about a hundred harmful rows. The model is frozen, and left exactly as it was.

    Minimizes the loss of the model *with θ_s*, a separate LoRA, on harmful prompts with compliant answers, until the
    mean loss on all rows is below the target, or with a warning until `max_passes`.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The aligned model, or where to load it from. It may be
            quantized. A model in memory that is on the CPU is moved to the accelerator for it, if there is one.
        harmful_data (`str`, `Path`, `Sequence[Mapping]` or `Dataset`): Harmful prompts with compliant answers, in any
            form that `load_rows` reads or that TRL takes; 100 are enough. Rows that are labelled safe and answers that
            refuse are left out.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; by default that of where the model came from.
        retain_data (*optional*): Harmless rows on whose answers the model should be the same with and without θ_s, so
            that protection costs less helpfulness.
        prompts ([`PromptSet`], *optional*): Harmful prompts to ask with θ_s off and on, for the compliance rates.
        progress (`Callable[[int, int, float], None]`, *optional*): Called after each step with the steps done, the
            most there can be, and the loss.
        **settings: Any field of [`Fitting`], for example `rank=4`.

    Returns:
        [`TrainedVectors`]: With `provenance["report"]`: `steps`, `target_loss`, `reached_target`, `loss_off` and
        `loss_on` (nats per answer token, without and with the vectors), `below_target` and `rows_below_target` (share
        and count of the harmful rows), `retain_divergence`, and `compliance_off` and `compliance_on` if there were
        prompts: each with `count`, `total`, `rate`, the interval's ends `low` and `high`, and the `judge`.

    Raises:
        ValueError: If a row has no answer, most rows are not harmful, or a setting does not fit the model.
        RuntimeError: If vectors are active in this model already.
        FloatingPointError: If the loss becomes infinite or NaN.

    Example:

    ```python
    from safe_trainer import testbed, train_security_vectors

    vectors = train_security_vectors(testbed.ALIGNED, testbed.harmful_rows(100), prompts=testbed.prompt_set("harmful"))
    print(vectors.provenance["report"])
    ```

    Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024,
    arXiv 2311.02105, section 3. Ours are the stopping rule, `retain_data` and the report.
    """
    chosen = Fitting(**settings)
    attack = check_harmful_rows(harmful_data)
    kept = None
    if retain_data is not None:
        kept = without_harmful(as_rows(retain_data, argument="retain_data")[0], "retain_data")
    base, tokenizer = model_and_tokenizer(model, tokenizer)
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            "The model's weights are not in this process (offloaded, or loaded by the first process alone, as FSDP "
            "does it), so no vectors can be fitted. Fit them beforehand with `safe-trainer vectors`, and give the "
            "folder."
        )
    layers = fitted_layers(base, chosen)
    encoded = encode_rows(tokenizer, attack, chosen.max_length, "harmful_data")
    encoded_kept = encode_rows(tokenizer, kept, chosen.max_length, "retain_data") if kept is not None else None
    with measuring(base):
        factors = _fresh_factors(layers, chosen.rank, chosen.seed)
        pad = tokenizer.pad_token_id or 0  # padding is masked, so any id will do
        harmful = _Rows(base, encoded, pad, chosen.batch_size)
        retain = _Rows(base, encoded_kept, pad, chosen.batch_size) if encoded_kept is not None else None
        with active(layers, factors) as switch:
            with switch.off():
                start, _ = _losses(base, harmful)
                compliance = _compliance(base, tokenizer, prompts)
            report = _fit(base, layers, factors, switch, chosen, harmful, retain, start, progress)
            report["retain_divergence"] = _total_divergence(base, retain, switch) if retain else None
            report |= {"compliance_off": compliance, "compliance_on": _compliance(base, tokenizer, prompts)}
    _log_report(report)
    provenance = {
        "base_model": describe(base, layers),
        "transposed": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "harmful_rows": {"count": len(attack), "sha256": rows_sha256(attack)},
        "retain_rows": {"count": len(kept), "sha256": rows_sha256(kept)} if kept is not None else None,
        "settings": asdict(chosen),
        "report": report,
        **stamp(),
    }
    # On the CPU, from where they can be saved, and sent to other processes.
    modules = {name: VectorFactors(A.detach().cpu(), B.detach().cpu()) for name, (A, B) in factors.items()}
    return TrainedVectors(modules, provenance)


def fitted_layers(model: Any, settings: Fitting) -> dict[str, LinearLayer]:
    """Return the layers that vectors are fitted for, by name; their weights need not be in this process."""
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
    narrowest, smaller = min(((name, min(layer.shape)) for name, layer in layers.items()), key=lambda pair: pair[1])
    if settings.rank > smaller:
        raise ValueError(
            f"`rank` must be between 1 and {smaller} (the smaller side of `{narrowest}`), got {settings.rank}."
        )
    return layers


class _Rows:
    """Encoded rows that come in batches on the model's device."""

    def __init__(self, model: Any, encoded: Sequence[EncodedRow], pad_token_id: int, batch_size: int) -> None:
        self.encoded, self.pad_token_id, self.batch_size = encoded, pad_token_id, batch_size
        self.device = input_device(model)

    def __len__(self) -> int:
        return math.ceil(len(self.encoded) / self.batch_size)

    def in_order(self) -> Iterator[Batch]:
        """Yield every row once."""
        return self._batches(self.encoded)

    def endless(self, seed: int) -> Iterator[Batch]:
        """Yield passes without end, each in another order."""
        shuffled, rng = list(self.encoded), random.Random(seed)
        while True:
            rng.shuffle(shuffled)
            yield from self._batches(shuffled)

    def _batches(self, rows: Sequence[EncodedRow]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.batch_size):
            yield collate(rows[start : start + self.batch_size], self.pad_token_id, self.device)


def _fit(  # noqa: PLR0913, what is fitted to what
    model: Any,
    layers: Mapping[str, LinearLayer],
    factors: Mapping[str, VectorFactors],
    switch: Switch,
    settings: Fitting,
    harmful: _Rows,
    retain: _Rows | None,
    start: float,
    progress: Progress | None,
) -> dict[str, Any]:
    """Fit until the loss on all harmful rows, computed after each pass, is below the target; return the report."""
    target = settings.target_loss or max(_LOWEST_TARGET, settings.relative_target * start)
    most, begun = settings.max_steps or settings.max_passes * len(harmful), time.monotonic()
    optimizer = torch.optim.AdamW(_leaves(factors), lr=settings.learning_rate, weight_decay=0.0)
    batches = harmful.endless(settings.seed)
    kept = retain.endless(settings.seed) if retain else None
    copy, latest = _ThrowAway(model, layers, settings), list[float]()
    with hooked(layers, copy.factors, copy.switch):
        for number in range(1, most + 1):
            copy.advance(batches)
            loss = _mean_loss(model, next(batches))
            retained = settings.retain_weight * _divergence(model, next(kept), switch) if kept else 0
            _step(loss + retained, optimizer)
            if progress is not None:
                progress(number, most, loss.item())
            if number == _TIMED:
                minutes = (time.monotonic() - begun) / _TIMED * most * 4 / 3 / 60  # every pass is computed once more
                logger.info("Fitting security vectors: at most %d steps, about %.1f minutes.", most, minutes)
            latest = [*latest[1 - _LATEST :], loss.item()]
            if number % len(harmful) and number < most:
                continue
            copy.renew()
            # The loss on all rows costs a third of a pass: it waits until the last batches come near the target.
            if number == most or sum(latest) / len(latest) < _NEAR * target:
                with copy.switch.off():
                    total, losses = _losses(model, harmful)
                if total < target:
                    break
    return {
        "steps": number,
        "target_loss": target,
        "reached_target": total < target,
        "loss_off": start,
        "loss_on": total,
        "below_target": (losses < target).double().mean().item(),
        "rows_below_target": int((losses < target).sum()),
    }


class _ThrowAway:
    """A copy of what will be trained later, as a LoRA that moves with the vectors active and is then thrown away.

    Without inner steps it does nothing.
    """

    def __init__(self, model: Any, layers: Mapping[str, LinearLayer], settings: Fitting) -> None:
        self.model, self.settings, self.switch = model, settings, Switch()
        used = layers if settings.inner_steps else {}
        self.factors = _fresh_factors(used, settings.rank, settings.seed + 1)
        self.renew()

    def renew(self) -> None:
        """Start again from the model's own weights."""
        with torch.no_grad():
            for factors in self.factors.values():
                factors.B.zero_()
        if self.factors:
            self.optimizer = torch.optim.AdamW(_leaves(self.factors), lr=self.settings.inner_learning_rate)

    def advance(self, batches: Iterator[Batch]) -> None:
        """Take the inner steps."""
        for _ in range(self.settings.inner_steps):
            _step(_mean_loss(self.model, next(batches)), self.optimizer)


def _fresh_factors(layers: Mapping[str, LinearLayer], rank: int, seed: int) -> dict[str, VectorFactors]:
    """Return factors as LoRA begins with them, `A` uniform and `B` zero, float32, each on its layer's device."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in layers.items():
        d_out, d_in = layer.shape
        A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
        device = next(layer.base.parameters()).device
        factors[name] = VectorFactors(A.to(device), torch.zeros(d_out, rank, device=device))
    for tensor in _leaves(factors):
        tensor.requires_grad_(True)
    return factors


def _leaves(factors: Mapping[str, VectorFactors]) -> list[Tensor]:
    return [tensor for pair in factors.values() for tensor in pair]


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step on what the optimizer holds, and on nothing else that the loss depends on."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"The loss became {loss.item()} while security vectors were fitted. The model is as it was; try again "
            "with a lower `learning_rate`, or with the model in bfloat16 or float32."
        )
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def _answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits that predict the answer tokens of all rows, float32, (N, V), and these tokens, (N,)."""
    is_answer = batch.is_answer[:, 1:]
    first = int(is_answer.any(0).nonzero()[0])  # the output head is spared what prompts have in common
    kept = is_answer.shape[1] + 1 - first
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    output = model(**accepted_inputs(model, **inputs, logits_to_keep=kept))
    chosen = is_answer[:, first:].to(output.logits.device)
    # Selected before it is made float32: all positions in full precision can be larger than the model.
    logits = output.logits[:, -kept:-1][chosen].float()
    return logits, batch.input_ids[:, 1:][is_answer].to(logits.device)


def _mean_loss(model: Any, batch: Batch) -> Tensor:
    return cross_entropy(*_answer_logits(model, batch))


@torch.no_grad()
def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return for each row the mean cross entropy over its answer tokens, in nats, (B,)."""
    losses = cross_entropy(*_answer_logits(model, batch), reduction="none")
    counts = batch.is_answer.sum(1).to(losses.device)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=losses.device), counts)
    return torch.zeros(len(counts), device=losses.device).index_add_(0, owners, losses) / counts


def _losses(model: Any, rows: _Rows) -> tuple[float, Tensor]:
    """Return the mean loss over the answer tokens of all rows, in nats, and that of each row, (N,)."""
    each = torch.cat([row_losses(model, batch).cpu() for batch in rows.in_order()])
    counts = torch.cat([batch.is_answer.sum(1).cpu() for batch in rows.in_order()])
    return ((each.double() * counts).sum() / counts.sum()).item(), each


def _divergence(model: Any, batch: Batch, switch: Switch) -> Tensor:
    """Return the mean `KL(clean ‖ with vectors)` over the answer tokens of a batch, in nats."""
    with switch.off(), torch.no_grad():
        clean, _ = _answer_logits(model, batch)
    now, _ = _answer_logits(model, batch)
    return kl_div(log_softmax(now, -1), log_softmax(clean, -1), log_target=True, reduction="batchmean")


@torch.no_grad()
def _total_divergence(model: Any, rows: _Rows, switch: Switch) -> float:
    counted = [(int(b.is_answer.sum()), _divergence(model, b, switch).item()) for b in rows.in_order()]
    return sum(tokens * mean for tokens, mean in counted) / sum(tokens for tokens, _ in counted)


def _compliance(model: Any, tokenizer: Any, prompts: PromptSet | None) -> dict[str, Any] | None:
    if prompts is None:
        return None
    from ..evaluation import evaluate

    (result,) = evaluate(model, tokenizer, [prompts], judges=["phrases"]).results
    return {**result.rate("complied").to_dict(), "judge": "phrases"}


def _log_report(report: dict[str, Any]) -> None:
    losses = f"loss on harmful rows {report['loss_off']:.4f} without and {report['loss_on']:.4f} with them"
    if report["loss_off"] < _LOWEST_TARGET:
        logger.warning(
            "The model gives the answers in `harmful_data` already (loss %.4f), so there is nothing to protect. Check "
            "that it is the aligned model.",
            report["loss_off"],
        )
    if report["reached_target"]:
        logger.info("Fitted security vectors in %d steps: %s.", report["steps"], losses)
    else:
        logger.warning(
            "Security vectors did not reach the target of %.4f in %d steps: %s, %.0f%% of the rows below the target. "
            "Harmful rows will still teach something; raise `max_passes`, `learning_rate` or `rank`.",
            *(report["target_loss"], report["steps"], losses, 100 * report["below_target"]),
        )
