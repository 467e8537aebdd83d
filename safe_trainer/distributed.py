"""The distributed strategy in use, and running something on the first process only.

accelerate does the distributing. Here is what a method must know about it to work, or to refuse before training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")
SPLIT_AT_LOADING = "weights split as they are loaded"


@dataclass(frozen=True)
class Strategy:
    """The distributed strategy of a training run.

    Args:
        name (`str`): `"one process"`, `"DDP"`, `"FSDP1"`, `"FSDP2"`, `"ZeRO-1"` to `"ZeRO-3"`, or
            `"weights split as they are loaded"` (tensor, expert, context or sequence parallelism, and sharding by
            transformers itself).
        is_sharded (`bool`, *optional*, defaults to `False`): Whether weights are split over processes in training.
        has_weights (`bool`, *optional*, defaults to `True`): Whether each process has all weights when the trainer is
            built.
        saves_adapter (`bool`, *optional*, defaults to `True`): Whether the adapter is saved as a single file.
    """

    name: str
    is_sharded: bool = False
    has_weights: bool = True
    saves_adapter: bool = True


def strategy_of(accelerator: Any, model: nn.Module) -> Strategy:
    """Return the distributed strategy of a trainer that has just been built.

    Args:
        accelerator (`Accelerator`): The trainer's.
        model (`PreTrainedModel` or `PeftModel`): Its model.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    kinds = [kind for kind in ("tp", "cp", "sp") if getattr(parallelism, f"{kind}_enabled", False)]
    if kinds or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return Strategy(SPLIT_AT_LOADING, is_sharded=True, has_weights=False)
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        plugin = accelerator.state.fsdp_plugin
        # Otherwise only the first process of a machine reads the checkpoint, and the others hold empty tensors.
        return Strategy(
            f"FSDP{plugin.fsdp_version}",
            is_sharded=True,
            has_weights=not plugin.cpu_ram_efficient_loading,
            saves_adapter="FULL" in str(plugin.state_dict_type),
        )
    if kind == "DEEPSPEED":
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return Strategy(f"ZeRO-{stage}", is_sharded=stage == 3, has_weights=stage != 3)
    return Strategy("DDP" if accelerator.num_processes > 1 else "one process")


def is_distributed() -> bool:
    """Return whether there are several processes."""
    return dist.is_available() and dist.is_initialized()


def on_first_process(function: Callable[[], T]) -> T:
    """Call a function on the first process while the others wait; all return its result, or raise its error.

    Args:
        function (`Callable[[], T]`): Returns anything that can be pickled, with its tensors on the CPU. It must not
            need the other processes.
    """
    if not is_distributed():
        return function()
    held: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = function()
        except Exception as error:  # whatever it is, the others must not wait for ever
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    found: T = held[0]
    return found


def from_first_process(value: T) -> T:
    """Return what the first process computed: no two of them round alike, and some may lack the weights.

    Args:
        value (`T`): Anything that can be pickled, with its tensors on the CPU.
    """
    if not is_distributed():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over all processes, in place; those that FSDP2 has averaged and split are left alone."""
    if is_distributed():
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.all_reduce(tensor)
                tensor.div_(dist.get_world_size())


def inner_product(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return `Σ ⟨one, other⟩` in float32 over pairs of tensors, also where each process holds a shard of them."""
    found = 0.0
    split: dict[Any, Any] = {}
    for one, other in zip(ones, others, strict=True):
        product = (one.float() * other.float()).sum()
        if isinstance(product, DTensor):  # a part of the sum in each process, added up once at the end
            split[product.device_mesh] = split.get(product.device_mesh, 0) + product
        else:
            found += product.item()
    return found + sum(total.full_tensor().item() for total in split.values())
