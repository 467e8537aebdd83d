"""Which model vectors belong to: its id, and a few values of every weight by which it is known under any id.

An id alone would refuse a model that was copied into another folder, and accept another state of the same folder. The
values are compared in bfloat16, so that the precision in which a model is loaded does not matter; weights that are
quantised are left out, and normalisations, embeddings and biases speak for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.updates import LinearLayer

_PER_WEIGHT = 4
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LOADED_ALIKE = 0.9  # rounding twice, through float16 say, moves some per cent of the values by a bit


def describe(model: Any, layers: Mapping[str, LinearLayer]) -> dict[str, Any]:
    """Return a model's id, its revision on the Hub, and some values of its weights, as JSON."""
    config = model.config
    return {
        "id": getattr(config, "_name_or_path", "") or "a model built in memory",
        "revision": getattr(config, "_commit_hash", None),
        "values": {name: _sample(tensor) for name, tensor in _weights(model, layers).items()},
    }


def difference(model: Any, layers: Mapping[str, LinearLayer], recorded: Mapping[str, Any]) -> str | None:
    """Return in words how a model differs from the recorded one, or `None` if it is the same."""
    current = describe(model, layers)
    shared = recorded.get("values", {}).keys() & current["values"].keys()
    pairs = [
        (one, other)
        for name in shared
        for one, other in zip(recorded["values"][name], current["values"][name], strict=False)
    ]
    equal = sum(one == other for one, other in pairs)
    if not pairs or equal >= _LOADED_ALIKE * len(pairs):
        return None
    return (
        f"they belong to `{recorded['id']}`, and this is `{current['id']}`: of {len(pairs)} weights compared "
        f"{equal} are equal"
    )


def _weights(model: Any, layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    found: dict[str, Any] = {name: getattr(layer.base, "weight", None) for name, layer in layers.items()}
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found |= {name: parameter for name, parameter in base_model.named_parameters() if parameter.ndim == 1}
    found["embedding"] = model.get_input_embeddings().weight
    return {name: tensor for name, tensor in found.items() if _is_readable(tensor)}


def _is_readable(tensor: Any) -> bool:
    # By type, since quantised weights are tensors of their own kind that may pretend to a floating dtype.
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.dtype in _PLAIN and not tensor.is_meta and tensor.numel() >= _PER_WEIGHT


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    return flat[:: flat.numel() // _PER_WEIGHT][:_PER_WEIGHT].to("cpu", torch.bfloat16).tolist()
