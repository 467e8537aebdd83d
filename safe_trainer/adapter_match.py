"""Whether the weights of a saved adapter fit the one at hand, and mean there what they meant where they were saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.distributed.tensor import DTensor

_SCALARS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
"""Settings without which the weights mean something else."""
_CHOICES = ("target_modules", "modules_to_save", "layers_to_transform", "exclude_modules", "target_parameters")
"""Settings that choose what is adapted. They may be written in many ways, so the weights' names decide."""
_PREFIX = "base_model.model."


def adapter_differences(saved: Mapping[str, Any], folder: Path, model: PeftModel) -> Iterator[str]:
    """Yield in words how a saved adapter differs from that of a model, as far as its weights would not be the same.

    Args:
        saved (`Mapping[str, Any]`): Its `adapter_config.json`.
        folder (`Path`): Where it lies.
        model (`PeftModel`): The model, whose active adapter is compared.
    """
    adapter = model.active_adapters[0]
    current = model.peft_config[adapter].to_dict()
    shared = saved.keys() & current.keys()
    different = [name for name in _SCALARS if name in shared and saved[name] != current[name]]
    yield from (_was(name, saved[name], current[name]) for name in different)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():  # an older format, or in pieces: what PEFT made of the settings decides
        for name in _CHOICES:
            if name in shared and _unordered(saved[name]) != _unordered(current[name]):
                yield _was(name, _unordered(saved[name]), _unordered(current[name]))
        return
    with safe_open(weights, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    yield from _by_names(shapes.keys(), tensors.keys())
    if not different:  # of another rank, all shapes are others
        yield from _by_shapes(shapes, tensors)


def _by_names(saved: Set[str], current: Set[str]) -> Iterator[str]:
    """Compare which tensors there are: what all settings together came to."""
    # PEFT saves whole embeddings along where they are new.
    embeddings = {name for name in saved - current if "embed" in name and ".lora_" not in name}
    lost, added = _modules(saved - current - embeddings), _modules(current - saved)
    if lost:
        yield f"it trained {_listing(lost)}, which this run does not"
    if added:
        yield f"this run trains {_listing(added)}, of which it has no weights"


def _by_shapes(saved: Mapping[str, tuple[int, ...]], current: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(saved.keys() & current.keys()):
        tensor = current[name]
        if isinstance(tensor, DTensor) or tensor.is_meta or not tensor.numel():
            continue  # the other part is with another process
        if tuple(tensor.shape) != saved[name]:
            yield f"`{name.removeprefix(_PREFIX)}` was {list(saved[name])} and is {list(tensor.shape)}"
            return  # one stands for all: where the base model differs, all do


def _modules(names: Set[str]) -> list[str]:
    return sorted({name.removeprefix(_PREFIX).split(".lora_")[0] for name in names})


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list, tuple, set)) else value


def _was(name: str, before: Any, now: Any) -> str:
    return f"`{name}` was {json.dumps(before)} and is {json.dumps(now)}"


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
