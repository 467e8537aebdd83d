"""Where an artifact comes from: the model, the versions, the date. A model is known by a few values of its weights.

Its id alone would refuse a copy in another folder, and accept another state of the same one. The values are compared
in bfloat16, whatever precision a model is loaded in; of a quantized one, norms, embeddings and biases are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..lora.io import at_revision
from ..lora.loading import load_weights, named, revision_of, source_of
from ..lora.updates import LinearLayer

_PER_WEIGHT = 4
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LOADED_ALIKE = 0.9  # rounding twice, through float16 say, moves some per cent of the values by a bit


def stamp() -> dict[str, Any]:
    """Return the versions of the libraries, and the date."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "versions": {"safe_trainer": __version__, **libraries},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(model: Any, layers: Mapping[str, LinearLayer]) -> dict[str, Any]:
    """Return a model's id, its revision on the Hub, and some values of its weights, as JSON."""
    return {
        "id": source_of(model) or "a model built in memory",
        "revision": revision_of(model),
        "values": {name: _sample(tensor) for name, tensor in _weights(model, layers).items()},
    }


def difference(model: Any, layers: Mapping[str, LinearLayer], recorded: Mapping[str, Any]) -> str | None:
    """Return how a model differs from the recorded one, in a sentence, or `None` if it is the same."""
    current = describe(model, layers)
    before, now = recorded.get("values", {}), current["values"]
    pairs = [pair for name in before.keys() & now.keys() for pair in zip(before[name], now[name], strict=False)]
    equal = sum(one == other for one, other in pairs)
    if not pairs or equal >= _LOADED_ALIKE * len(pairs):
        return None
    return (
        f"they belong to `{recorded['id']}`, and this is `{current['id']}`: of {len(pairs)} weights compared "
        f"{equal} are equal"
    )


def model_and_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return a model and its tokenizer, loaded from where they are if they are not given themselves."""
    from transformers import AutoTokenizer

    source, revision = at_revision(named(model))
    if tokenizer is None and not source:
        raise ValueError("The model was built in memory, so its tokenizer could not be loaded. Give `tokenizer`.")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if isinstance(model, (str, Path)):
        model = load_weights(source, revision=revision)
    return model, tokenizer


def _weights(model: Any, layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    found: dict[str, Any] = {name: getattr(layer.base, "weight", None) for name, layer in layers.items()}
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found |= {name: parameter for name, parameter in base_model.named_parameters() if parameter.ndim == 1}
    found["embedding"] = model.get_input_embeddings().weight
    return {name: tensor for name, tensor in found.items() if _is_readable(tensor)}


def _is_readable(tensor: Any) -> bool:
    # By type, since quantized weights are special tensors that may claim a floating dtype.
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.dtype in _PLAIN and not tensor.is_meta and tensor.numel() >= _PER_WEIGHT


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    return flat[:: flat.numel() // _PER_WEIGHT][:_PER_WEIGHT].to("cpu", torch.bfloat16).tolist()
