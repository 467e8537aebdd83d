"""SaLoRA: a LoRA that cannot write into the directions that layers write to when the model refuses."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..artifacts import calibration
from ..artifacts.calibration import InputTokens, Side
from ..artifacts.safety_basis import SafetyBasis, check_rank, few_refusals
from ..distributed import from_first_process
from ..lora import reparametrize as factors
from ..lora import updates as adapters
from .base import FormField, MethodCard, Paper, PeftSupport, SafetyMethod, SelfCheck, check_choices, check_whole

logger = logging.getLogger(__name__)

Protect = Literal["output", "input", "both"]
Start = Literal["task", "guardspace"]
Directions = Literal["safety", "random"]

_UNGUARDED = {"protect": "output", "directions": "random", "rank": 0, "task_rank": 0}


@dataclass
class SaLoRA(SafetyMethod):
    """Safety-alignment preserved LoRA: trains `ΔW = C (B A − B0 A0)`, where `C` removes the directions of refusals.

    The *fixed safety module*: with `X_s` a layer's inputs while the aligned model answers harmful prompts safely, and
    `U_s` the top left singular vectors of `W X_s`, the projector `C = I − U_s U_sᵀ` lets an update write into all
    directions but these. The *task-specific initialization*: with `U_t` the same for the task's rows, and `U_w S_w
    V_wᵀ` the rank-r part of `W`, training starts from `B0 = U_t U_tᵀ U_w √S_w` and `A0 = √S_w V_wᵀ`; what they
    contribute is subtracted, so the model is unchanged at step 0. With increments `dA`, `dB` that start at zero,

        C (B A − B0 A0)  =  [C dB, C B0] · [A0 + dA ; dA],

    an ordinary LoRA of rank 2r on the untouched base model: **the saved adapter has twice the rank that you gave**, at
    the same scaling. `compact_adapter` cuts it to the smallest rank that is exact.

    When to use it: to keep refusals through *benign* fine-tuning, with a lower learning rate than for plain LoRA. It
    is not made to stop data that teaches harm; `protect="input"` goes further there. Controls: `rank=0` and
    `directions="random"`. Biases and `modules_to_save` are trained as usual, unprotected.

    Args:
        rank (`int`, *optional*, defaults to `32`): `r_s`, protected directions of each layer; `0` for none, a control.
        energy (`float`, *optional*): Of these, only the fewest that explain this share of variance, such as `0.95`.
        task_rank (`int`, *optional*, defaults to `32`): `r_t`, directions of the task that `B0` is restricted to; `0`
            is LoRA's own start, `ΔW = C B A`, and no doubled rank.
        safety_data (`str`, `Path` or `Iterable[Mapping]`, *optional*): Harmful prompts with refusals, or their file.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): Instead of these, directions measured before.
        protect (`str`, *optional*, defaults to `"output"`): `"output"`: as above, the paper's. `"input"`: `ΔW = (B A −
            B0 A0)(I − V_s V_sᵀ)`, with `V_s` (d_in x r_s) the top input directions at the prompts. `"both"`: both.
        input_tokens (`str`, *optional*, defaults to `"prompt"`): Tokens of which these are, or `"answer"`, or `"all"`.
        directions (`str`, *optional*, defaults to `"safety"`): `"random"` protects as many random directions, the
            control for the measured ones. Needs no data.
        samples (`int`, *optional*, defaults to `128`): Rows to draw, from `safety_data` and from the training rows.
        max_length (`int`, *optional*, defaults to `1024`): Where these are cut, in tokens.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw and of random directions.
        start (`str`, *optional*, defaults to `"task"`): `"task"`: as above. `"guardspace"`, for `protect="input"`: the
            part of `W` that harmful prompts need least, whatever `task_rank`. With the second moments `M` of a layer's
            inputs there, of the r smallest components of `W M = U Σ Vᵀ`: `B0 = U √Σ` and `A0 = √Σ Vᵀ M⁻¹`. `M` is made
            of all directions that the basis holds and the mean variance of the others, with 1 % of its mean added.

    Attributes:
        safety_basis ([`SafetyBasis`] or `None`): What was measured or loaded, once attached; `save` it for other runs.

    Raises:
        ValueError: If a setting is out of its range, there is no data, a basis does not fit the model, or the PEFT
            configuration is not plain LoRA.
        FloatingPointError: If the model's activations are infinite or NaN.

    Example:

    ```python
    >>> from safe_trainer import SaLoRA
    >>> SaLoRA(safety_data="refusals.jsonl").rank
    32

    ```

    Source: Li et al., "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation", ICLR 2025, arXiv 2501.01765, section
    4, and the authors' code. From there: `C`, the initialisation, all defaults (and r = alpha = 16 on q_proj and
    v_proj, learning rate 1e-4). `start="guardspace"`, and with it `energy` close to 1: GuardSpace, arXiv 2510.14301.
    Ours: the increment form, one pass for all layers, `protect`, the controls.
    """

    name: ClassVar[str] = "SaLoRA"
    tag: ClassVar[str] = "salora"
    peft_support: ClassVar[PeftSupport] = "lora"
    needs_weights: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation",
        author="Li, Mingjie and others",
        year=2025,
        arxiv="2501.01765",
        venue="International Conference on Learning Representations",
    )
    card: ClassVar[MethodCard] = MethodCard(
        title="SaLoRA",
        summary="Finds the directions that layers write to when the model refuses, and keeps the adapter out of them.",
        needs="about 100 harmful prompts with refusals",
        cost="one pass over those prompts, an adapter of twice the rank, and ideally a lower learning rate",
        avoid="data with harmful rows: on the testbed it made no difference from plain LoRA there",
        fields=(
            FormField("rank", "SaLoRA: protected directions per layer", 0, 512, 1),
            FormField("protect", "SaLoRA: protected side", choices=get_args(Protect)),
        ),
        example=lambda given: SaLoRA(safety_data=given.safety_data),
    )

    rank: int = 32
    energy: float | None = None
    task_rank: int = 32
    safety_data: str | Path | Iterable[Mapping[str, Any]] | None = field(default=None, repr=False)
    basis: SafetyBasis | str | Path | None = field(default=None, repr=False)
    protect: Protect = "output"
    input_tokens: InputTokens = "prompt"
    directions: Directions = "safety"
    samples: int = 128
    max_length: int = 1024
    seed: int = 0
    start: Start = "task"
    safety_basis: SafetyBasis | None = field(default=None, init=False, repr=False, compare=False)
    _continues: bool = field(default=False, init=False, repr=False, compare=False)
    _updates: dict[str, adapters.LoraUpdate] = field(default_factory=dict, init=False, repr=False, compare=False)
    _bases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole(self, rank=0, task_rank=0, samples=1, max_length=1)
        check_choices(self, start=Start, protect=Protect, input_tokens=InputTokens, directions=Directions)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"`energy` must be above 0 and at most 1, got {self.energy}. Usual is 0.95.")
        if self.rank and self.directions == "safety" and (self.safety_data is None) == (self.basis is None):
            raise ValueError(
                "SaLoRA needs to know what safe answers look like: give one of `safety_data` (harmful prompts with "
                "refusals, rows or a file) and `basis` (a SafetyBasis, or its file)."
            )
        if not self.rank and not self.task_rank:
            raise ValueError("With `rank=0` and `task_rank=0` nothing is left of SaLoRA. Use no method instead.")
        for name, misfit in _UNGUARDED.items() if self.start == "guardspace" else ():
            if getattr(self, name) == misfit:
                raise ValueError(
                    "`start='guardspace'` needs `protect='input'` or `'both'`, `directions='safety'`, and `rank` and "
                    f"`task_rank` above 0, got `{name}={misfit!r}`. Change `{name}`, or leave `start` out."
                )
        self._sides: tuple[Side, ...] = ("output", "input") if self.protect == "both" else (self.protect,)
        self._sampling: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "max_length": self.max_length}

    def adapt_peft_config(self, config: Any) -> Any:
        """Refuse what would write past the projector; double the rank, and alpha with it, for the increment form."""
        config = super().adapt_peft_config(config)
        self._continues = config is None
        if config is None:
            return None
        for name, plain in (("lora_bias", False), ("bias", "none")):
            if (given := getattr(config, name)) != plain:
                raise ValueError(
                    f"SaLoRA does not work with `{name}={given!r}`: no projector stands between a bias and the "
                    f"protected directions. Remove `{name}` from `LoraConfig`."
                )
        if config.init_lora_weights not in (True, "gaussian") and self.task_rank:
            raise ValueError(
                f"SaLoRA brings its own initialisation and cannot use `init_lora_weights="
                f"{config.init_lora_weights!r}`. Remove it from `LoraConfig`, or switch SaLoRA's off: `task_rank=0`."
            )
        if self.task_rank:
            logger.info("SaLoRA saves adapters of rank %d: twice `r=%d`, at the same scaling.", 2 * config.r, config.r)
            growth = 2**0.5 if config.use_rslora else 2  # so that alpha / r, or alpha / √r, stays
            config.r *= 2
            config.lora_alpha *= growth
            config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
            config.alpha_pattern = {name: growth * alpha for name, alpha in config.alpha_pattern.items()}
        return config

    def check_model(self, model: nn.Module) -> None:
        """Refuse a `rank` that leaves a layer nothing to learn in."""
        layers, updates = adapters.linear_layers(model), adapters.lora_updates(model, self.name)
        for side in self._sides:
            check_rank({name: layers[name] for name in updates}, side, self.rank)

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Measure or load the directions of every adapted layer, and set `A0` and `B0`."""
        self.check_model(model)
        self._updates = adapters.lora_updates(model, self.name, scaled=False)
        self.covered_layers = list(self._updates)
        layers = {name: layer for name, layer in adapters.linear_layers(model).items() if name in self._updates}
        self.safety_basis = None
        self._bases = self._protected(model, tokenizer, layers)
        if self._continues:
            self._check_trained()
            return
        task: dict[str, linalg.TopDirections] = {}
        if self.task_rank and self.start == "task":
            examples = calibration.examples_from(train_dataset, tokenizer, argument="train_dataset", **self._sampling)
            task = calibration.top_directions(model, layers, examples, rank=self.task_rank)["output"]
        for name, update in self._updates.items():
            factors.set_factors(update, *from_first_process(self._start(name, update, task.get(name))))

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Train `dA` and `dB` instead of the factors, for the length of `train()`."""
        with factors.trained_through(self._updates, self._rules):
            yield

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Return how many directions are protected, and how much of the layers' activity they hold."""
        if not self.rank:
            return SelfCheck({}, ("`rank=0` protects no directions; nothing is protected.",))
        places = [(name, side) for name in self._bases for side in self._sides]
        counts = [self._bases[name][side == "input"].shape[1] for name, side in places]
        figures = {"protected directions (mean)": sum(counts) / len(counts)}
        if self.safety_basis is not None:
            shares = [self.safety_basis.side(side)[name].explained_variance for name, side in places]
            figures["explained variance (mean)"] = sum(shares) / len(shares)
        complaint = few_refusals(self.provenance or {}) if "output" in self._sides else ""
        return SelfCheck(figures, (complaint,) if complaint else ())

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return the largest share of a layer's `‖ΔW‖_F` in protected directions, which is of the size of rounding."""
        shares = []
        with torch.no_grad():
            for name, (U_s, V_s) in self._bases.items():
                B, A = self._updates[name].factors()
                total = linalg.product_norm_squared(B, A).clamp(min=1e-30)
                for inside in ((U_s.to(B.device).mT @ B, A), (B, A @ V_s.to(A.device))):
                    shares.append((linalg.product_norm_squared(*inside) / total).sqrt().item())
        return {"salora/leak": max(shares)}

    def _rules(self, name: str) -> tuple[nn.Module, nn.Module]:
        U_s, V_s = self._bases[name]
        return factors.IncrementA(V_s, self.task_rank > 0), factors.IncrementB(U_s, self.task_rank > 0)

    def _protected(self, model: nn.Module, tokenizer: Any, layers: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `U_s` (d_out x k) and `V_s` (d_in x k) by layer; a side that is not protected has `k = 0`."""
        bases = {name: [torch.zeros(size, 0) for size in layer.shape] for name, layer in layers.items()}
        if self.rank and self.directions == "safety":
            wanted: dict[str, Any] = {"modules": list(layers), "sides": self._sides, "rank": self.rank}
            wanted["input_tokens"] = self.input_tokens
            if self.basis is None:
                basis = SafetyBasis.from_rows(model, tokenizer, self.safety_data, **wanted, **self._sampling)
            else:
                basis = self.basis if isinstance(self.basis, SafetyBasis) else SafetyBasis.load(self.basis)
                basis.check_fits(model, **wanted)
            self.safety_basis, self.provenance = basis, basis.provenance
        for name, layer in layers.items() if self.rank else ():
            for side in self._sides:
                if self.safety_basis is not None:
                    found = self.safety_basis.side(side)[name].top(self.rank, self.energy)
                else:  # each layer has its own seed, so that layers of one shape do not share one subspace
                    seed = self.seed + zlib.crc32(f"{name}.{side}".encode())
                    found = linalg.random_basis(layer.shape[side == "input"], self.rank, seed)
                bases[name][side == "input"] = found
        return {name: (pair[0], pair[1]) for name, pair in bases.items()}

    def _start(
        self, name: str, update: adapters.LoraUpdate, task: linalg.TopDirections | None
    ) -> tuple[Tensor, Tensor]:
        """Return the factors to start from: `[0, C B0]` and `[A0 P ; 0]`, or LoRA's own, `C B` and `A P`."""
        U_s, V_s = self._bases[name]
        if not self.task_rank:
            B, A = (factor.cpu() for factor in update.factors())
            return linalg.outside(B, U_s), linalg.outside(A.mT, V_s).mT
        W = adapters.weight(update.layer)
        r = update.layer.r[update.adapter] // 2
        if r > min(W.shape):
            raise ValueError(
                f"`r` of `LoraConfig` must be at most {min(W.shape)}, the smaller side of `{name}`, got {r}: training "
                "starts from the rank-r part of the weight. Lower `r`, for this layer in `rank_pattern`."
            )
        if task is not None:
            B0, A0 = (factor.cpu() for factor in linalg.balanced_factors(W, r))
            B0 = task.basis @ (task.basis.mT @ B0)
        else:
            assert self.safety_basis is not None
            B0, A0 = (factor.cpu() for factor in linalg.least_factors(W, self.safety_basis.inputs[name], r))
        B0, A0 = linalg.outside(B0, U_s), linalg.outside(A0.mT, V_s).mT
        return torch.cat([torch.zeros_like(B0), B0], dim=1), torch.cat([A0, torch.zeros_like(A0)])

    def _check_trained(self) -> None:
        """Make sure that an adapter which came with the model is one of SaLoRA's, to be trained on."""
        for name, update in self._updates.items():
            B, _ = update.factors()
            if not B.any() or (self.task_rank and B.shape[1] % 2):
                raise ValueError(
                    f"The model came with a LoRA that SaLoRA did not make: `{name}` is untrained or has an odd rank. "
                    "Pass the base model and `peft_config`, so that SaLoRA can set rank and start."
                )
        with factors.trained_through(self._updates, self._rules):
            pass  # the rules refuse factors in protected directions
