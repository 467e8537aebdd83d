"""Running a model without leaving a trace: evaluation mode that gives each module its own mode back."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn


def input_device(model: Any) -> torch.device:
    """Return where a model takes its inputs; of one whose weights are offloaded, where it computes."""
    device: torch.device = next(model.parameters()).device
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((place for place in places if place is not None), device))
    return device


def accepted_inputs(model: Any, **inputs: Any) -> dict[str, Any]:
    """Return the inputs without `position_ids` and `logits_to_keep` where the model's forward does not take them.

    Such a model finds positions by itself and returns logits for all of them, so what is read is the last ones.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    refused = {"position_ids", "logits_to_keep"} - inspect.signature(base.forward).parameters.keys()
    return {name: value for name, value in inputs.items() if name not in refused}


def check_known_adapters(model: nn.Module) -> None:
    """Refuse a model whose adapters are in its layers and no `PeftModel` around it, since none could be told off."""
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The `{type(model).__name__}` has an adapter in its layers that no `PeftModel` holds, as after "
            "`model.add_adapter`, or when transformers loads an adapter's folder: it would pass for a part of the "
            "model's own weights. Load the base model, and its adapter with `PeftModel.from_pretrained(model, "
            "adapter, is_trainable=True)`, or give a `peft_config`."
        )


def check_trained(model: nn.Module) -> None:
    """Refuse a model in which training would change nothing, which libraries do not report."""
    check_known_adapters(model)
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "The model's adapter is merged into its weights, which compute without it, so nothing would be trained. "
            "Call `model.unmerge_adapter()`, or give the merged model and a `peft_config`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No weight of the model requires a gradient, so nothing would be trained. Give a `peft_config`, or load "
            "its adapter with `PeftModel.from_pretrained(model, adapter, is_trainable=True)`."
        )
    if isinstance(getattr(model, "get_output_embeddings", lambda: None)(), TrainableTokensWrapper):
        raise ValueError(
            "`trainable_token_indices` does not work on a model whose output head is tied to its embeddings: TRL's "
            "loss reads the head directly, and never through the adapter. Leave it out, or train all tokens with "
            '`modules_to_save=["embed_tokens"]`.'
        )


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name of each parameter that is trained the module that holds it."""
    held = [
        (f"{place}.{name}".lstrip("."), module, parameter)
        for place, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    return {name: module for name, module, parameter in held if parameter.requires_grad}


@contextmanager
def evaluation_mode(model: nn.Module, *, freeze: bool = False, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Put a model into evaluation mode for the length of a context; each module then returns to its own mode.

    With `freeze=True` (default `False`) no parameter requires a gradient there. Modules listed in `but` keep their
    mode.
    """
    training = [module for module in model.modules() if module.training and module not in but]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    try:
        for module in training:  # one by one, since part of a model may be in evaluation mode on purpose
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        with trainable_layout(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch a model's adapters off, if it has any; afterwards those that were active are so again, trained as before.

    PEFT's own `disable_adapter` makes all of the active adapter trainable on leaving, also what was frozen.
    """
    check_known_adapters(model)
    if not isinstance(model, PeftModel):
        yield
        return
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)


@contextmanager
def trainable_layout(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights in the layout that training needs while the model runs in evaluation mode.

    On a CPU that computes in bfloat16, bitsandbytes rearranges 4-bit weights when a layer runs in evaluation mode, for
    a kernel without a gradient. Trained afterwards, the model silently has wrong gradients before its last layers; and
    going back loses precision.
    """
    # The layer's own switch, and public. It is only read in a forward pass.
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Let a model that a trainer has prepared compute in its own dtype, as it will when it is loaded."""
    # Accelerate wraps the forward pass and keeps the one before under this name. Its own `unwrap_model` takes off
    # the decorators of transformers, too, and does not put anything back.
    prepared = {name: vars(model)[name] for name in ("forward", "_original_forward") if name in vars(model)}
    if len(prepared) < 2:
        yield
        return
    model.forward = prepared["_original_forward"]
    try:
        yield
    finally:
        model.forward = prepared["forward"]
