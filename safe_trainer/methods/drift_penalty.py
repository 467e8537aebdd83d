"""DriftPenalty: a penalty on changing how layers represent harmful prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import linalg
from ..artifacts.calibration import InputTokens
from ..artifacts.safety_basis import SafetyBasis, load_or_measure_basis
from ..lora import updates as adapters
from .base import FormField, MethodCard, PenaltyMethod, SelfCheck, check_choices, check_number, check_whole, moved


@dataclass
class DriftPenalty(PenaltyMethod):
    """Adds `λ · mean over layers of E‖ΔW x‖² / E‖W x‖²` to the loss, `x` a layer's inputs at harmful prompts.

    The penalty is the share of the outputs' energy on harmful prompts that an update changes; anything else can be
    learned freely. So `weight` means the same in every model and layer: with `weight=100`, a mean change by 1 % of the
    energy costs 1 nat. The second moment of `x` is kept as its top directions and the mean of the rest; with
    `ΔW = B A` a step forms nothing larger than r x d.

    When to use it: against the drift of *benign* fine-tuning, also of full-parameter training, where [`SaLoRA`] cannot
    go. What to know: it slows an update that harmful rows ask for and does not stop it; a longer attack gets through.

    Args:
        weight (`float`, *optional*, defaults to `10.0`): `λ`, in nats for a change of all energy; `0` only measures.
        rank (`int`, *optional*, defaults to `64`): Top input directions kept; less where a layer is narrower.
        safety_data (`str`, `Path` or `Iterable[Mapping]`, *optional*): Harmful prompts with answers (not read by
            default), or their file.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): Instead of these, input directions measured before.
        input_tokens (`str`, *optional*, defaults to `"prompt"`): Tokens that count: `"prompt"`, `"answer"` or `"all"`.
        samples (`int`, *optional*, defaults to `128`): Rows to draw.
        max_length (`int`, *optional*, defaults to `1024`): Where these are cut, in tokens.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.

    Raises:
        ValueError: If a setting is out of its range, there is no data, a basis does not fit the model, or the PEFT
            configuration is not plain LoRA.
        FloatingPointError: If the model's activations are infinite or NaN.

    Example:

    ```python
    >>> from safe_trainer import DriftPenalty
    >>> DriftPenalty(safety_data="refusals.jsonl").weight
    10.0

    ```

    Source: ours, no paper. The form of the penalty is AsFT's (arXiv 2506.08473) with the layer's own inputs in place
    of the alignment direction; weighting an update by activations is elastic weight consolidation's idea.
    """

    name: ClassVar[str] = "Drift penalty"
    tag: ClassVar[str] = "drift-penalty"
    needs_weights: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Drift penalty",
        summary="A penalty on changing how layers represent harmful prompts; anything else can be learned freely.",
        needs="about 100 harmful prompts",
        cost="one pass over those prompts before training, and a penalty in each step",
        avoid="stopping harmful rows: it slows them down, and a longer attack gets through",
        fields=(
            FormField("weight", "Drift penalty: weight λ", 0.0, 1000.0, 1.0, help="Larger allows less drift."),
            FormField("rank", "Drift penalty: input directions per layer", 1, 512, 1),
        ),
        example=lambda given: DriftPenalty(safety_data=given.harmful_data),
    )

    weight: float = 10.0
    rank: int = 64
    safety_data: str | Path | Iterable[Mapping[str, Any]] | None = field(default=None, repr=False)
    basis: SafetyBasis | str | Path | None = field(default=None, repr=False)
    input_tokens: InputTokens = "prompt"
    samples: int = 128
    max_length: int = 1024
    seed: int = 0
    _explained: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _updates: dict[str, adapters.Update] = field(default_factory=dict, init=False, repr=False, compare=False)
    _moments: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number(self, "weight", "Usual is 10.")
        check_choices(self, input_tokens=InputTokens)
        check_whole(self, rank=1, samples=1, max_length=1)
        if (self.safety_data is None) == (self.basis is None):
            raise ValueError(
                "DriftPenalty needs harmful prompts: give one of `safety_data` (rows or a file) and `basis` (a "
                "SafetyBasis with input directions, or its file)."
            )

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Measure or load the layers' inputs at harmful prompts, in units of their outputs' energy."""
        self._updates = adapters.updates(model, self.name)
        self.covered_layers = list(self._updates)
        layers = {name: layer for name, layer in adapters.linear_layers(model).items() if name in self._updates}
        wanted: dict[str, Any] = {"rank": min(self.rank, min(layer.shape[1] for layer in layers.values()) - 1)}
        wanted |= {name: getattr(self, name) for name in ("input_tokens", "samples", "max_length", "seed")}
        source = self.basis, self.safety_data, model, tokenizer
        basis = load_or_measure_basis(*source, layers=layers, sides=("input",), **wanted)
        self.provenance = basis.provenance
        self._explained = [basis.inputs[name].explained_variance for name in layers]
        self._moments = {
            name: _relative_moment(basis.inputs[name], self.rank, adapters.weight(layer.base))
            for name, layer in layers.items()
        }

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Return how much of the inputs' energy the kept directions hold."""
        figures = {"explained variance of inputs (mean)": fmean(self._explained)}
        return SelfCheck(figures, super().self_check(model).warnings)

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return each layer's part of the mean share of the outputs' energy that the update changes."""
        return {name: self._drift(name) / len(self._updates) for name in self._updates}

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return for each layer the share of its outputs' energy on harmful prompts that the update changes."""
        with torch.no_grad():
            return {f"drift_penalty/{name}": self._drift(name).item() for name in self._updates}

    def _drift(self, name: str) -> Tensor:
        left, right = self._updates[name].factors()
        directions, rest = moved(self._moments, name, left.device)
        if right is None:
            return (left @ directions).square().sum() + rest * left.square().sum()
        leading = linalg.product_norm_squared(left, right @ directions)
        return leading + rest * linalg.product_norm_squared(left, right)


def _relative_moment(inputs: linalg.TopDirections, rank: int, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return `D` (d_in x k) and `t` with `E‖M x‖² / E‖W x‖² = ‖M D‖² + t ‖M‖²` for every `M` (d_out x d_in).

    The second moment of the inputs is modelled as `V diag(s²) Vᵀ + τ (I − V Vᵀ)`, with `τ` the mean of what the
    directions `V` leave of the energy.
    """
    V, squares = inputs.basis[:, :rank].double(), inputs.singular_values[:rank].double().square()
    d_in, k = V.shape
    tau = max(0.0, inputs.total_variance - squares.sum().item()) / max(1, d_in - k)
    D = V * (squares - tau).clamp(min=0).sqrt()
    W = W.detach().cpu().double()
    energy = ((W @ D).square().sum() + tau * W.square().sum()).item()
    if energy == 0:  # the layer's output on harmful prompts is zero: there is nothing to keep
        return torch.zeros(d_in, 0), torch.tensor(0.0)
    return (D / math.sqrt(energy)).float(), torch.tensor(tau / energy)
