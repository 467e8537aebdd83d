"""The one abstraction of the library: a safety method, its card, and the moments at which it may act."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..distributed import SPLIT_AT_LOADING, Strategy
from ..lora.updates import check_peft_config

__all__ = ["FormField", "Materials", "MethodCard", "Paper", "PeftSupport", "SelfCheck"]
__all__ += ["PenaltyMethod", "SafetyMethod", "check_choices", "check_number", "check_whole"]

PeftSupport = Literal["any", "weights", "lora"]
"""PEFT configurations that a method works with: any; those of weights, not of prompts; LoRA alone, `scaling · B A`."""
LOW_COVERAGE = 0.9
"""A method that acts on a smaller share of the trained weights is warned about."""
_CALLED_IN = {"compute_loss": ("penalty", "token_weights"), "training_step": ("training_step", "after_backward")}
"""The trainer's methods, which a subclass may override, and the moments that come in them."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, for model cards; `author` is the first one, as BibTeX writes names."""

    title: str
    author: str
    year: int
    arxiv: str
    venue: str = ""

    @property
    def citation(self) -> str:
        """Return the BibTeX entry."""
        surname, first_word = (re.split(r"\W", text)[0].lower() for text in (self.author, self.title))
        fields = {"title": f"{{{self.title}}}", "author": self.author, "booktitle": self.venue, "year": self.year}
        fields["note"] = f"arXiv:{self.arxiv}"
        listed = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        return f"@{'inproceedings' if self.venue else 'misc'}{{{surname}{self.year}{first_word},\n{listed}\n}}"


@dataclass(frozen=True)
class FormField:
    """One setting of a method that a form shows: a number with its range, or a selection with its `choices`."""

    name: str
    label: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""


@dataclass(frozen=True)
class Materials:
    """What a demo, a form or a test builds a method from; data in any form that methods take.

    `harmful_data` are harmful prompts with answers that comply, `safety_data` with refusals.
    """

    harmful_data: Any
    safety_data: Any
    unaligned_model: str | None = None
    aligned_model: str | None = None
    harmful_prompts: Any = None
    benign_prompts: Any = None


@dataclass(frozen=True)
class MethodCard:
    """What users are shown of a method. App cards, demo, recipe schema, docs and test matrix are made from it.

    `summary` is one sentence; `needs`, `cost` and `avoid` say what the user provides, what it costs, and when not to
    use it; `example` builds the method as the demo uses it; `needs_unaligned` is for the checkpoint before alignment.
    """

    title: str
    summary: str
    needs: str
    cost: str
    avoid: str
    fields: tuple[FormField, ...]
    example: Callable[[Materials], SafetyMethod]
    needs_unaligned: bool = False


@dataclass(frozen=True)
class SelfCheck:
    """What a method measured of its own protection: figures by name, and warnings where it may have no effect."""

    figures: Mapping[str, float]
    warnings: tuple[str, ...] = ()


class SafetyMethod:
    """Base of all methods: a dataclass of settings that may act at several moments, each of which does nothing here.

    Subclass it as a dataclass whose fields are the user's settings, give it a `card`, override the moments it needs,
    and add it to `METHODS`. In the order in which [`SafeSFTTrainer`] calls them:

    | moment | when |
    |---|---|
    | `adapt_peft_config` | before the model is wrapped by PEFT |
    | `check_strategy` | when the distributed strategy is known |
    | `attach`, then `self_check` | right after the model is wrapped, before any optimizer exists |
    | `training` | around `train()` |
    | `training_step` | around the forward and backward pass of every micro-batch |
    | `token_weights` | for every micro-batch, between the forward pass and the loss |
    | `penalty` | for every micro-batch, after the loss |
    | `after_backward` | once per optimizer step, before gradients are clipped |
    | `diagnostics` | once, when `train()` has ended well |

    Whatever a method adds to a model in `training` must be gone when its context closes, however it closes. A method
    belongs to the trainer that it was given to last.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class StayClose(SafetyMethod):
    ...     weight: float = 0.01
    ...
    ...     def penalty(self, model):
    ...         return self.weight * sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    ```
    """

    name: ClassVar[str] = "safety method"
    """What tables and model cards call the method."""
    tag: ClassVar[str] = "safety-method"
    """Its tag on the model card and on the Hub."""
    card: ClassVar[MethodCard | None] = None
    """What users are shown of it."""
    paper: ClassVar[Paper | None] = None
    """Its source, if it has one."""
    peft_support: ClassVar[PeftSupport] = "any"
    """Which PEFT configurations it works with."""
    needs_weights: ClassVar[bool] = False
    """Whether every process must hold all of the model's weights when the method is attached."""
    penalty_works_with_zero3: ClassVar[bool] = False
    """Whether `penalty` is right where DeepSpeed ZeRO-3 has split the weights; refused unless a method says so."""
    step: int = 0
    """Optimizer steps that the run has made; the trainer keeps it, also when it resumes."""
    peft_config: PeftConfig | None = None
    """What the model is wrapped with; `None` where it is trained in full or is a `PeftModel` already."""
    provenance: Mapping[str, Any] | None = None
    """What the tensors in use were made from, once attached. Saved with checkpoints, so that a resumed run may give
    a basis, direction or vectors instead of the data they were made from."""
    attached_to: Mapping[str, nn.Module] | None = None
    """By name of each parameter that was trained when the method was attached, its module; the trainer keeps it."""
    covered_layers: Collection[str] | None = None
    """Names of the modules (in the base model) whose update the method acts on, once it is attached; `None` for all.
    The trainer reports which share of the trained parameters this is, and warns below 90 %."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, as a recipe lists them next to `method`."""
        if not is_dataclass(self):
            return {}
        found = {}
        for field in (field for field in fields(self) if field.init):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if (value := getattr(self, field.name)) is not default and value != default:
                found[field.name] = value
        return found

    def adapt_peft_config(self, config: PeftConfig | None) -> PeftConfig | None:
        """Return the PEFT configuration to wrap the model with; one that `peft_support` leaves out is refused.

        Args:
            config (`PeftConfig` or `None`): A copy of the user's, free to be changed; `None` where the model is
                trained in full or is a `PeftModel` already.

        Raises:
            ValueError: If the method does not work with it; says what to use instead.
        """
        if config is not None and self.peft_support == "lora":
            check_peft_config(config, self.name)
        elif getattr(config, "is_prompt_learning", False) and self.peft_support == "weights":
            raise ValueError(
                f"{self.name} does not work with {type(config).__name__}, which puts virtual tokens before every "
                "prompt. Use `LoraConfig(...)` or another adapter of weights, or train all weights."
            )
        self.peft_config = config
        return config

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the settings do not fit, as far as its layers' names and shapes show.

        Recipes call it with a model on the meta device, before any weights are loaded; `attach` must refuse the same.
        """

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a distributed strategy under which the method would fail or be wrong.

        Raises:
            ValueError: With what to use instead.
        """
        used = strategy.name
        weights_missing = self.needs_weights and not strategy.has_weights
        penalty_split = used == "ZeRO-3" and overrides(self, "penalty") and not self.penalty_works_with_zero3
        reasons = (
            (used == "FSDP1", "which keeps all weights of a layer in one flat piece. Use FSDP2: `fsdp_version: 2` in "
             "the configuration of accelerate."),
            (used == SPLIT_AT_LOADING, "(tensor, expert, context or sequence parallelism, or a `distributed_config` "
             "of transformers). Load the complete model, and use DDP, FSDP2 or ZeRO-2."),
            (not strategy.saves_adapter, "with this `fsdp_state_dict_type`: no adapter would be saved. Set "
             "`fsdp_state_dict_type: FULL_STATE_DICT` in the configuration of accelerate."),
            (weights_missing, "with this configuration: it needs the model's weights in every process when training "
             "begins. Use FSDP2 with `fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2."),
            (penalty_split, "which has split the weights again when the penalty is computed. Use FSDP2 or ZeRO-2."),
            (used.startswith("ZeRO") and overrides(self, "after_backward"), "which keeps gradients in buffers of its "
             "own after the backward pass. Use DDP or FSDP2."),
        )  # fmt: skip
        for applies, reason in reasons:
            if applies:
                raise ValueError(f"{self.name} does not work with {used} {reason}")

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Prepare for this model; called once, when the trainer has been built and before any optimizer exists.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The model that will be trained.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with the chat template in use.
            train_dataset (`Dataset` or `IterableDataset`): The rows as TRL prepared them (`input_ids`, `labels`).
        """

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Measure how strong the protection is likely to be, right after `attach`."""
        return SelfCheck({})

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Surround `train()`; undo on leaving whatever was done on entering, also after an exception."""
        yield

    @contextmanager
    def training_step(self, model: nn.Module) -> Iterator[None]:
        """Surround each micro-batch's forward and backward pass, and nothing that callbacks do in between."""
        yield

    def token_weights(self, model: nn.Module, inputs: Mapping[str, Any], log_probs: Tensor) -> Tensor | None:
        """Return the weight of each token in the loss, or `None` to leave the loss alone.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The model in training.
            inputs (`Mapping[str, Any]`): The micro-batch with its `labels` (batch, tokens), as the model was called
                with it: `model(**inputs).log_probs` are those of the model in another state.
            log_probs (`torch.Tensor`): The model's log-probabilities of all tokens but the first, (batch, tokens - 1),
                without a gradient; 0 where `labels` are -100.

        Returns:
            `torch.Tensor` or `None`: Weights in the shape of `log_probs`; no gradient passes through them. Those of
            several methods are multiplied. The loss is divided by the number of tokens, whatever their weights.
        """
        return None

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a scalar to add to the loss, already weighted, or `None`: a function of the weights and of `step`.

        It counts once for each optimizer step, whatever the accumulation and the number of processes.
        """
        return None

    def after_backward(self, model: nn.Module) -> None:
        """Read or change `parameter.grad`, once per optimizer step: accumulated, unscaled and not yet clipped.

        Under DDP gradients are averaged over processes by then, under FSDP2 they are the shards of this process.
        """

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return figures about the finished run, to be logged under their names."""
        return {}


class PenaltyMethod(SafetyMethod):
    """Base of methods that add `weight · Σ terms` to the loss, one scalar term for each layer (or whatever it names).

    It refuses ZeRO-3, terms that are not finite and, unless `peft_support` says otherwise, PEFT configurations whose
    update is not `scaling · B A`, and computes terms in float32 under autocast. A subclass is a dataclass with a field
    `weight` that implements `terms`.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class SmallFactors(PenaltyMethod):
    ...     weight: float = 0.01
    ...
    ...     def terms(self, model):
    ...         return {name: (p**2).sum() for name, p in model.named_parameters() if p.requires_grad}

    ```
    """

    peft_support: ClassVar[PeftSupport] = "lora"
    weight: float

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the terms of the penalty without `weight`: scalars by name, each on its layer's own device."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `terms`.")

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Warn where the weight is zero, so that nothing is protected."""
        return SelfCheck({}, ("`weight=0` only measures; nothing is protected.",) if self.weight == 0 else ())

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return `weight · Σ terms` as a scalar in float32.

        Raises:
            FloatingPointError: If a term is infinite or NaN; names the first and says what can be done.
        """
        # Autocast would round the factors to bfloat16 and the penalty with them.
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            terms = self.terms(model)
            if not terms:
                return None
            device = next(iter(terms.values())).device
            values = torch.stack([term.float().to(device) for term in terms.values()])
        if not torch.isfinite(values).all():
            names = [name for name, value in zip(terms, values, strict=True) if not torch.isfinite(value)]
            raise FloatingPointError(
                f"The {self.name} penalty is not finite in {len(names)} of {len(terms)} layers, first `{names[0]}`: "
                "training has diverged. Start a new run with a lower `learning_rate`, or with `max_grad_norm` below "
                "its current value; a checkpoint resumes with the settings it was made with and would diverge again."
            )
        return self.weight * values.sum()


def overrides(method: SafetyMethod, moment: str) -> bool:
    """Return whether a method overrides a moment, given by its name."""
    return getattr(type(method), moment) is not getattr(SafetyMethod, moment)


class Attendance(TrainerCallback):
    """Tells methods the step, and refuses one in which the trainer, by a subclass, left out what they act in.

    Args:
        methods (`Sequence[SafetyMethod]`): The trainer's methods.
        trainer (`str`): The name of its class, for messages.
    """

    def __init__(self, methods: Sequence[SafetyMethod], trainer: str) -> None:
        self.methods, self.trainer = methods, trainer
        self.called: set[str] = set()
        """Which of the trainer's methods ran since the last optimizer step; they note it themselves."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set each method's `step`."""
        for method in self.methods:
            method.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step that would not be protected, before it is taken."""
        for place, moments in _CALLED_IN.items():
            absent = [m.name for m in self.methods if any(overrides(m, moment) for moment in moments)]
            if absent and place not in self.called:
                raise ValueError(
                    f"{' and '.join(absent)} did not act in step {state.global_step + 1}, so it would not be "
                    f"protected: `{self.trainer}.{place}` left out what `SafeSFTTrainer` does there. Call "
                    f"`super().{place}(...)` in it."
                )
        self.called.clear()


def check_report(method: SafetyMethod, model: nn.Module) -> dict[str, Any]:
    """Return a method's self-check and its coverage as JSON: `coverage`, `figures` and `warnings`."""
    check, share = method.self_check(model), coverage(method, model)
    warnings = list(check.warnings)
    if share < LOW_COVERAGE:
        warnings.append(
            f"it acts on only {share:.0%} of the trained weights; the others (experts, embeddings, "
            "`modules_to_save`) are not protected. Train linear layers only, or judge the model by a comparison."
        )
    if method.covered_layers is not None and isinstance(model, PeftModel) and any(map(_is_bias, _trained(model))):
        warnings.append(
            "it does not act on biases, and some are trained. Remove `bias` and `lora_bias` from `LoraConfig`, or "
            "judge the model by a comparison."
        )
    return {"coverage": share, "figures": dict(check.figures), "warnings": warnings}


def describe_report(name: str, report: Mapping[str, Any]) -> str:
    """Return a method's report but its warnings, such as `AsFT (acts on 88% of the trained weights, energy 0.25)`."""
    facts = [f"acts on {report['coverage']:.0%} of the trained weights"]
    facts += [f"{figure.replace('_', ' ')} {value:.3g}" for figure, value in report["figures"].items()]
    return f"{name} ({', '.join(facts)})"


def coverage(method: SafetyMethod, model: nn.Module) -> float:
    """Return the share of the trained weights whose update a method acts on."""
    if method.covered_layers is None:
        return 1.0
    within = tuple(f"{layer}." for layer in method.covered_layers)
    sizes = _trained(model)
    covered = sum(size for name, size in sizes.items() if name.startswith(within) and not _is_bias(name))
    return covered / max(1, sum(sizes.values()))


def _trained(model: nn.Module) -> dict[str, int]:
    """Return the sizes of the trained weights, by name in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # DeepSpeed's ZeRO-3 leaves an empty tensor in place of a weight that it has split.
    return {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in base.named_parameters()
        if parameter.requires_grad
    }


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def moved(tensors: dict[str, tuple[Tensor, ...]], name: str, device: Any) -> tuple[Tensor, ...]:
    """Return `tensors[name]` on a device, and keep them there: where a layer is trained is known in the first step."""
    if any(tensor.device != device for tensor in tensors[name]):
        tensors[name] = tuple(tensor.to(device) for tensor in tensors[name])
    return tensors[name]


def check_whole(method: Any, **least: int) -> None:
    """Refuse settings that are not whole numbers, each of at least the number that is given for it."""
    for name, smallest in least.items():
        value = getattr(method, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
        if value < smallest:
            raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")


def check_number(method: Any, name: str, usual: str, *, above: float | None = None) -> None:
    """Refuse a setting that is not a finite number of at least 0, or above a bound; `usual` ends the message."""
    value = getattr(method, name)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}. {usual}")
    fits = float(value) >= 0 if above is None else float(value) > above
    if not (math.isfinite(value) and fits):
        bound = "of at least 0" if above is None else f"above {above:g}"
        raise ValueError(f"`{name}` must be a finite number {bound}, got {value}. {usual}")


def check_choices(method: Any, **choices: Any) -> None:
    """Refuse settings that are not among the values that their `Literal` type lists."""
    for name, known in choices.items():
        if (value := getattr(method, name)) not in get_args(known):
            raise ValueError(f"`{name}` must be one of {', '.join(get_args(known))}, got {value!r}.")
