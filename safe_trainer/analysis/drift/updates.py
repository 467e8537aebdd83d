"""What a fine-tune changed, read from disk layer by layer: an adapter's factors, or the difference of two models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...artifacts.checkpoint_reader import Checkpoint, listing
from ...lora.io import naming, read_adapter, read_config
from ...lora.reparametrize import scaling
from ...lora.updates import check_peft_config, linear_layers, weight

logger = logging.getLogger(__name__)

_FACTOR = ".lora_A.weight"
_WRAPPED = "base_model.model."
_HEAD = "lm_head"


class Factors(NamedTuple):
    """A matrix `M A` (d_out x d_in) as its factors, in float32."""

    left: Tensor
    """`M`, of shape (d_out, n)."""
    right: Tensor | None = None
    """`A`, of shape (n, d_in); `None` is an identity, and `M` the whole matrix."""


class Start:
    """The weights that a fine-tune started from, read from a checkpoint one at a time.

    Args:
        source (`str` or `Path`): The base model: a folder or a Hub id.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it is no causal language model in full precision.
    """

    def __init__(self, source: str | Path) -> None:
        self.checkpoint = Checkpoint("base", source)
        self.shapes = {name: linear.shape for name, linear in self.checkpoint.linears.items()}

    def __call__(self, name: str) -> Tensor:
        """Return the weight of one linear layer, (d_out, d_in) in float32."""
        return read_weight(self.checkpoint, name)


def is_adapter(source: str | Path) -> bool:
    """Tell whether a folder or Hub id holds a PEFT adapter and no whole model."""
    if Path(source).is_dir():
        # Some trainers leave the model's config.json beside an adapter.
        has_weights = any(any(Path(source).glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))
        return (Path(source) / "adapter_config.json").is_file() and not has_weights
    try:
        PeftConfig.from_pretrained(str(source))
    except (ValueError, OSError):  # how PEFT says that there is none
        return False
    return True


def is_plain(source: str | Path) -> bool:
    """Tell whether an adapter is a LoRA whose update is `scaling · B A`."""
    config = read_config(source)
    config.target_modules = None  # a LoRA on the head, which methods refuse, can be left out here
    try:
        check_peft_config(config, "The drift")
    except ValueError:
        return False
    return True


def merged_updates(
    base: str | Path, adapter: str | Path, start: Callable[[str], Tensor]
) -> Iterator[tuple[str, Factors]]:
    """Yield what merging an adapter of any kind changes in each linear layer; loads the model.

    Raises:
        ValueError: If the adapter cannot be merged, as prompts and prefixes.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with naming(adapter):
        model = PeftModel.from_pretrained(model, str(adapter))
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"The adapter `{adapter}` changes no weights, so there is no drift to measure.")
    for name, layer in linear_layers(model.merge_and_unload()).items():
        change = weight(layer.outer).float() - start(name)
        if change.any():
            yield name, Factors(change)


def updates_of(
    tuned: str | Path, start: Callable[[str], Tensor], shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, Factors]]:
    """Yield what a fine-tune changed, `ΔW = W_tuned − W_base`, one linear layer after the other.

    A LoRA adapter gives its two factors, with its scaling; of a whole model one difference at a time is in memory.

    Args:
        tuned (`str` or `Path`): A LoRA adapter or a whole model: a folder or a Hub id.
        start (`Callable[[str], Tensor]`): Returns the base model's weight (d_out x d_in) of a layer by name.
        shapes (`dict[str, tuple[int, int]]`): (d_out, d_in) of the base model's linear layers by name.

    Yields:
        `tuple[str, Factors]`: Name and update. Layers that did not change at all are left out.

    Raises:
        OSError: If there is nothing to read.
        ValueError: If the adapter's update is no product of two factors, or `tuned` does not fit the base model.
    """
    if is_adapter(tuned):
        found = adapter_factors(tuned)
        sizes = {n: (len(left), right.shape[1]) for n, (left, right) in found.items() if right is not None}
        _check(tuned, sizes, shapes)
        yield from found.items()
        return
    folder = Path(tuned)
    if folder.is_absolute() and not folder.exists() or folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`{tuned}` holds no adapter and no whole model. Give the folder of one, or a Hub id.")
    checkpoint = Checkpoint("tuned", tuned)
    _check(tuned, checkpoint.shapes(checkpoint.linears), shapes)
    for name in checkpoint.linears:
        change = read_weight(checkpoint, name).sub_(start(name).cpu())
        if change.any():
            yield name, Factors(change)


def adapter_factors(source: str | Path) -> dict[str, Factors]:
    """Return `ΔW = scaling · B A` of every linear layer that a LoRA adapter changes, as factors, by the layer's name.

    Args:
        source (`str` or `Path`): Folder or Hub id of the adapter; the base model is not needed.

    Raises:
        ValueError: If it is no plain LoRA on linear layers.
    """
    config, tensors = read_adapter(source)
    if not is_plain(source):
        raise ValueError(
            f"The update of the adapter `{source}` is not `scaling · B A`, so it cannot be read from its file. Merge "
            "it: `AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder)`, and "
            "give that folder."
        )
    found = {}
    for key in [key for key in tensors if key.endswith(_FACTOR) and tensors[key].ndim == 2]:
        prefix = key.removesuffix(_FACTOR)
        name = prefix.removeprefix(_WRAPPED)
        if name.split(".")[-1] == _HEAD:
            continue  # no head is counted, of whole models neither
        right, left = tensors.pop(key).float(), tensors.pop(f"{prefix}.lora_B.weight").float()
        found[name] = Factors(scaling(config, name, right.shape[0]) * left, right)
    if not found:
        raise ValueError(f"The adapter `{source}` holds no LoRA on a linear layer, so there is no drift to measure.")
    if tensors:
        logger.warning("`%s` also changes %s, which is not counted.", source, listing(list(tensors), 3))
    return found


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return one linear layer's weight from disk, (d_out, d_in) in float32."""
    linear = checkpoint.linears[name]
    rows = checkpoint.rows(name, 0, linear.shape[1] if linear.is_transposed else linear.shape[0])
    return rows.mT.contiguous() if linear.is_transposed else rows


def norm(factors: Factors) -> float:
    """Return `‖M A‖_F`."""
    return row_products(factors, factors).sum().clamp(min=0).sqrt().item()


def row_products(one: Factors, other: Factors) -> Tensor:
    """Return the inner product of each row of one matrix with the same row of another, (d_out,) in float64.

    Two factored matrices are never multiplied out.
    """
    if one.right is None and other.right is None:
        return torch.einsum("od,od->o", one.left.double(), other.left.double())
    if one.right is None:
        one, other = other, one
    assert one.right is not None
    across = other.left @ one.right.mT if other.right is None else other.left @ (other.right @ one.right.mT)
    return (one.left.double() * across.double()).sum(dim=1)


def _check(tuned: str | Path, found: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, int]]) -> None:
    strange = [name for name, shape in found.items() if tuple(shapes.get(name, ())) != tuple(shape)]
    if strange:
        raise ValueError(
            f"`{tuned}` does not fit the base model: {len(strange)} of its {len(found)} layers are not there, or have "
            f"another shape: {listing(strange, 3)}. Give the model that it was trained from."
        )
