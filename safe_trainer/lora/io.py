"""Adapters on disk: read whole or refused by name, and compared with the adapter at hand.

PEFT reads what it finds: of an adapter that was cut short it tells in the words of the file format, and of one that
lacks a factor it makes one that does nothing there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, isfinite
from torch.distributed.tensor import DTensor

_DAMAGES = (SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a damaged adapter may end with."""
_SCALARS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
"""Settings without which the weights mean something else."""
_CHOICES = ("target_modules", "modules_to_save", "layers_to_transform", "exclude_modules", "target_parameters")
"""Settings that choose what is adapted. They may be written in many ways, so the weights' names decide."""
_PREFIX = "base_model.model."


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Say of whatever goes wrong while an adapter is read which adapter it was, in a `ValueError`."""
    try:
        yield
    except _DAMAGES as error:
        raise ValueError(
            f"The adapter `{source}` cannot be read: {error or type(error).__name__}. It was cut short or damaged, or "
            "is no adapter; save or copy it again."
        ) from error


def read_config(source: str | Path) -> PeftConfig:
    """Return the settings of an adapter.

    Args:
        source (`str` or `Path`): Its folder, or its id on the Hub.

    Raises:
        ValueError: If they are damaged.
    """
    with naming(source):
        config = PeftConfig.from_pretrained(str(source))
        if config.peft_type is None:
            raise ValueError("its settings do not say of which kind it is")
    return config


def read_adapter(source: str | Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return settings and weights of an adapter, once its factors are known to belong together.

    Args:
        source (`str` or `Path`): Its folder, or its id on the Hub.

    Raises:
        ValueError: If a file is missing or damaged, or the weights are not what its settings say; says which.
    """
    config = read_config(source)
    with naming(source):
        files = [Path(source, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
        if Path(source).is_dir() and not any(file.is_file() for file in files):
            raise ValueError(f"it holds no `{SAFETENSORS_WEIGHTS_NAME}`")
        tensors: dict[str, Tensor] = load_peft_weights(str(source), device="cpu")
        if not tensors:
            raise ValueError("it holds no weights")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not isfinite(tensor).all():
                raise ValueError(f"`{name}` holds values that are infinite, NaN or no floating point")
        for name in tensors:
            _check_factor(name, tensors, config)
    return config, tensors


def _check_factor(name: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Compare a factor of LoRA with the other one, and with the rank that the settings give it."""
    kind = next((kind for kind in ("lora_A", "lora_B") if f".{kind}.weight" in name), None)
    if kind is None or config.peft_type != "LORA":
        return
    other = name.replace(kind, "lora_B" if kind == "lora_A" else "lora_A")
    if other not in tensors:
        raise ValueError(f"it holds `{name}` and no `{other}`")
    A, B = (tensors[name], tensors[other]) if kind == "lora_A" else (tensors[other], tensors[name])
    layer = name.removeprefix(_PREFIX).split(".lora_")[0]
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    is_of_experts = bool(config.target_parameters)  # the factors of all experts are one
    if A.ndim < 2 or B.ndim < 2 or B.shape[1] != A.shape[0] or (A.shape[0] != rank and not is_of_experts):
        shapes = f"{list(B.shape)} and {list(A.shape)}"
        raise ValueError(f"the factors of `{layer}` are of shape {shapes}, and its rank is {rank}")


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
    yield from _by_names(shapes.keys(), tensors.keys(), _embeddings(model))
    if not different:  # of another rank, all shapes are others
        yield from _by_shapes(shapes, tensors)


def _by_names(saved: Set[str], current: Set[str], embeddings: Set[str]) -> Iterator[str]:
    """Compare which tensors there are: what all settings together came to."""
    lost, added = _modules(saved - current - embeddings), _modules(current - saved)
    if lost:
        yield f"it trained {_listing(lost)}, which this run does not"
    if added:
        yield f"this run trains {_listing(added)}, of which it has no weights"


def _embeddings(model: PeftModel) -> set[str]:
    """Return the names under which PEFT saves whole embeddings along, as it does where the vocabulary has grown."""
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    modules = [name for name, module in base.named_modules(remove_duplicate=False) if any(module is e for e in ends)]
    return {
        f"{_PREFIX}{name}.{parameter}" for name in modules for parameter in ("weight", "bias", "base_layer.weight")
    }


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
