"""What training adds to a model's linear layers, by name: with `io`, all that touches PEFT's layers.

A LoRA layer holds its update as `ΔW = scaling · B A`; one that is trained in full as the difference to the weights
it started from. Both give *factors*, all d_out x d_in, GPT-2's transposed `Conv1D` included.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

# Others subtract their start from the base weight, so that `B A` is not the update; one that is new to us may do so.
_BASE_KEEPING_INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

_REMEDIES = {
    "target_parameters": (
        'Leave it out and name linear layers in `target_modules`, such as `["q_proj", "k_proj", "v_proj", "o_proj"]`. '
        'On a mixture of experts, PEFT itself sets it where `target_modules` includes experts, as `"all-linear"` does.'
    )
}


@dataclass(frozen=True)
class LoraUpdate:
    """`ΔW = scaling · B A` of one LoRA layer; the scaling is left out where `scaled` is false."""

    layer: LoraLayer
    adapter: str
    scaled: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Return (d_out, d_in)."""
        return self.layer.out_features, self.layer.in_features

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `scaling · B` (d_out x r) and `A` (r x d_in)."""
        left = whole(self.layer.lora_B[self.adapter].weight)
        right = whole(self.layer.lora_A[self.adapter].weight)
        return (self.layer.scaling[self.adapter] * left if self.scaled else left), right


@dataclass
class FullUpdate:
    """`ΔW = W - W_start` of one layer that is trained in full; keeps a copy of the start."""

    layer: Any  # nn.Linear or Conv1D
    start: Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (d_out, d_in)."""
        d_out, d_in = _oriented(self.layer, self.start).shape
        return d_out, d_in

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Return `ΔW` (d_out x d_in) and `None`."""
        trained = self.layer.weight
        if isinstance(trained, DTensor) and not isinstance(self.start, DTensor):
            self.place()  # other processes than the first may have copied what is no weight yet
        # Training may begin by rounding the weights: what that changed is no update.
        start = self.start.to(trained.device, trained.dtype).float()
        return _oriented(self.layer, whole(trained.float() - start)), None

    def place(self) -> None:
        """Bring the start to where the weight is by now, sharded as it is: from the first process to all others."""
        weight, start = self.layer.weight, self.start
        if isinstance(weight, DTensor) and not isinstance(start, DTensor):
            start = torch.empty_like(start, device="cpu") if start.is_meta else start
            start = distribute_tensor(start, weight.device_mesh, weight.placements)
        self.start = start.to(weight.device)


Update = LoraUpdate | FullUpdate


def updates(model: Any, method: str, scaled: bool = True, copied: bool = True) -> dict[str, Update]:
    """Return the update of every linear layer that is being trained, by the layer's name in the base model.

    For LoRA these are all adapted layers, with their scaling if `scaled`; otherwise all trainable linear layers but
    the output head, whose start is `copied`, or there once the model is sharded and [`FullUpdate.place`] has been
    called. `method` is who asks, for the `ValueError` if nothing linear is trained, or `ΔW = scaling · B A` does not
    hold.
    """
    if isinstance(model, PeftModel):
        return dict(lora_updates(model, method, scaled))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, Update] = {
        name: FullUpdate(layer, layer.weight.detach().clone() if copied else layer.weight.detach().to("meta"))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head and layer.weight.requires_grad
    }
    if not found:
        raise ValueError(f"{method} found no trainable linear layer in `{type(model).__name__}`. Unfreeze the layers.")
    return found


def lora_updates(model: PeftModel, method: str, scaled: bool = True) -> dict[str, LoraUpdate]:
    """Return the update of every layer of the active LoRA adapter; arguments and errors as in [`updates`]."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"{method} works on a LoRA only. Give `peft_config=LoraConfig(...)` to the trainer.")
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"{method} protects one adapter, but {model.active_adapters} are active. Call `model.set_adapter(name)` "
            "first."
        )
    adapter = model.active_adapters[0]
    check_peft_config(model.peft_config[adapter], method)
    found = {
        name: LoraUpdate(layer, adapter, scaled)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter in {*layer.lora_A, *layer.lora_embedding_A}
    }
    for name, update in found.items():
        _check_linear(name, update, method)
    if not found:
        raise ValueError(f"{method} found no LoRA layer of the adapter `{adapter}`. Check `target_modules`.")
    return found


def check_peft_config(config: PeftConfig, method: str) -> None:
    """Refuse PEFT configurations whose update is not `scaling · B A`, with what to use instead."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(
            f"{method} works with `LoraConfig` or with full-parameter training, got a PEFT configuration of type "
            f"{kind}: its update is not a product of two factors. Use `LoraConfig(...)`, or leave `peft_config` out."
        )
    reasons = {
        "use_dora=True": (getattr(config, "use_dora", False), "DoRA rescales the base weight's columns"),
        base_changing_setting(config): (
            changes_base(config),
            "it changes the base weight, or is not known to keep it",
        ),
        "target_parameters": (getattr(config, "target_parameters", None), "bare parameters are not linear layers"),
        "layer_replication": (getattr(config, "layer_replication", None), "replicated layers share one base weight"),
    }
    for setting, (given, reason) in reasons.items():
        if given:
            raise ValueError(
                f"{method} does not work with `{setting}`: {reason}, so the update is not `scaling · B A`. "
                f"{_REMEDIES.get(setting, f'Remove `{setting}` from `LoraConfig`.')}"
            )
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, Collection) and "lm_head" in ({targets} if isinstance(targets, str) else set(targets)):
        raise ValueError(
            f"{method} and TRL's fused loss do not support a LoRA on `lm_head`, whose weight is read directly and "
            "never through the adapter. Remove `lm_head` from `target_modules`."
        )


def changes_base(config: PeftConfig) -> bool:
    """Return whether putting the adapter on a model changes the base weights, or may do so."""
    return bool(base_changing_setting(config))


def base_changing_setting(config: PeftConfig) -> str:
    """Return the setting by which an adapter changes the base weights when it is put on a model, or an empty text."""
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower() not in _BASE_KEEPING_INITIALISATIONS:
        return f"init_lora_weights={start!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) is not None else ""


def keeps_base(config: PeftConfig) -> bool:
    """Return whether a model is its base again where the adapter is switched off; trained biases stay switched on."""
    return not changes_base(config) and getattr(config, "bias", "none") == "none"


def weight(layer: Any) -> Tensor:
    """Return a layer's own weight (d_out x d_in), unwrapped, and dequantised if need be; a view where it can be."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if base.weight.is_meta or not base.weight.numel():
        raise ValueError(
            f"The weight of a {type(base).__name__} is not in memory: it is offloaded, or split by DeepSpeed ZeRO-3. "
            "Load all of its weights; for several processes use DDP, FSDP2 or ZeRO-2."
        )
    if get_bnb_param_type(base.weight):  # PEFT's helper for any module breaks 8-bit layers on the CPU that have run
        return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).detach()
    return _oriented(base, dequantize_module_weight(base).detach())


class LinearLayer(NamedTuple):
    """A linear layer of the model, whatever PEFT has put around it."""

    outer: nn.Module
    """What the model calls: PEFT's wrapper where there is one, otherwise the layer."""
    base: nn.Module
    """What holds the weight, quantised or not."""
    shape: tuple[int, int]
    """(d_out, d_in)."""


def linear_layers(model: Any) -> dict[str, LinearLayer]:
    """Return every linear layer but the output head, by name in the base model, trained or frozen, wrapped or not."""
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base_model.get_output_embeddings() if hasattr(base_model, "get_output_embeddings") else None
    found: dict[str, LinearLayer] = {}
    closed = None  # what is inside a wrapper is PEFT's: its factors are linear layers too
    for name, module in base_model.named_modules():
        if closed is not None and name.startswith(closed):
            continue
        base, wraps = module, isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
        if wraps:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        # By attribute and not by class, since quantised layers derive from `nn.Linear` in some libraries only.
        names = ("nf", "nx") if isinstance(base, Conv1D) else ("out_features", "in_features")
        d_out, d_in = (getattr(base, name, None) for name in names)
        if module is not head and isinstance(d_out, int) and isinstance(d_in, int):
            found[name] = LinearLayer(module, base, (d_out, d_in))
        if wraps or module is head:
            closed = name + "."
    return found


def _check_linear(name: str, update: LoraUpdate, method: str) -> None:
    layer: Any = update.layer  # a mixin, which type checkers do not take for a module
    adapter, base = update.adapter, layer.get_base_layer()
    if adapter not in layer.lora_A or isinstance(layer, ParamWrapper) or not isinstance(base, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{method} protects linear layers, but the LoRA of `{name}` sits on a {type(base).__name__}. Leave "
            f"`{name.rsplit('.', 1)[-1]}` out of `target_modules`."
        )
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise ValueError(
            f"{method} works with plain LoRA, but `{name}` uses the variant {variant}, whose update is not "
            "`scaling · B A`. Remove the option that asks for it from `LoraConfig`."
        )


def _oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.mT if isinstance(layer, Conv1D) else matrix


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter in float32, gathered where it is sharded: penalties need all of it, and full precision."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()
