"""Fitting security vectors: the model is frozen, a small LoRA beside it learns what harmful rows want."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from ... import __version__
from ...data.encoding import encode_rows
from ...data.rows import PromptSet, Row
from ...lora.updates import LinearLayer, linear_layers
from . import identity
from .hooks import VectorFactors, active
from .inputs import loaded, rows_provenance, with_tokenizer
from .loop import Loop, Rows, fresh_factors, frozen, total_divergence, total_loss
from .weights import TrainedVectors

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
        answer token), `retain_divergence`, and `harmful_score_off` and `harmful_score_on` if there were prompts.

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
        report = {
            "steps": outcome.steps,
            "reached_target": outcome.reached_target,
            "loss_off": loss_off,
            "loss_on": outcome.loss,
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
    from ...evaluation import evaluate

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
