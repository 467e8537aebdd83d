"""Security vectors at work: added to a model's linear layers for the length of a context, and surely gone afterwards.

Two ways that compute the same. Hooks add `B_s (A_s x)` to what a layer returns, and so work over any weight: trained,
frozen, quantised or sharded. Folding exchanges a frozen weight `W` for `W + B_s A_s`, which costs a second copy of the
weights in memory and no time in a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ...lora.updates import LinearLayer


class VectorFactors(NamedTuple):
    """One layer's part of the security vectors: it adds `B (A x)`. The paper's scaling `s` is part of `B`."""

    A: Tensor
    """Of shape (r, d_in)."""
    B: Tensor
    """Of shape (d_out, r)."""


@dataclass
class Switch:
    """Says when vectors act.

    Args:
        in_training_only (`bool`, *optional*, defaults to `False`): Whether they act only in layers that are in
            training mode.
        on (`bool`, *optional*, defaults to `True`): Whether they act at all.
    """

    in_training_only: bool = False
    on: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model be its clean self for a while."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def acts_in(self, layer: nn.Module) -> bool:
        """Return whether the vectors act in this layer now."""
        return self.on and (layer.training or not self.in_training_only)


# Which layers carry vectors at this moment. Kept here and not on the layers, so that a model holds nothing of ours.
_occupied: WeakSet[nn.Module] = WeakSet()


@contextmanager
def active(
    layers: Mapping[str, LinearLayer],
    factors: Mapping[str, VectorFactors],
    *,
    in_training_only: bool = False,
    fold: bool = False,
) -> Iterator[Switch]:
    """Add security vectors to a model for the length of a context.

    Args:
        layers (`Mapping[str, LinearLayer]`): The model's linear layers by name, from [`~adapters.linear_layers`].
        factors (`Mapping[str, VectorFactors]`): The vectors by the names of the layers that they act on. Factors that
            require gradients receive them.
        in_training_only (`bool`, *optional*, defaults to `False`): Whether they act in training mode only, so that an
            evaluation in between sees the clean model.
        fold (`bool`, *optional*, defaults to `False`): Whether to exchange the weights instead of adding hooks. Only
            for frozen weights that are neither quantised nor sharded.

    Yields:
        [`Switch`]: To turn them off for a while.

    Raises:
        RuntimeError: If vectors are at work in this model already.
        ValueError: If `fold` does not fit a layer.
    """
    occupied = next((name for name in factors if layers[name].outer in _occupied), None)
    if occupied is not None:
        raise RuntimeError(
            f"Security vectors are already at work in this model (`{occupied}`), and two at once would add up. Let "
            "the first training, fitting or scan end before the next begins."
        )
    switch = Switch(in_training_only)
    _forget_compiled_code()
    try:
        _occupied.update(layers[name].outer for name in factors)
        with (folded if fold else hooked)(layers, factors, switch):
            yield switch
    finally:
        _occupied.difference_update([layers[name].outer for name in factors])
        _forget_compiled_code()


@contextmanager
def hooked(layers: Mapping[str, LinearLayer], factors: Mapping[str, VectorFactors], switch: Switch) -> Iterator[None]:
    """Let each layer return `B (A x)` more while the switch says so; in the layer's own precision."""
    handles = []
    try:
        for name, vectors in factors.items():
            # On PEFT's wrapper where there is one: whatever it does with the layer inside, `B (A x)` comes once.
            handles.append(layers[name].outer.register_forward_hook(_Branch(vectors, switch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Branch:
    """The forward hook of one layer."""

    def __init__(self, vectors: VectorFactors, switch: Switch) -> None:
        self.A, self.B = vectors
        self.switch = switch

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.switch.acts_in(layer):
            return None
        hidden = args[0].to(output.dtype)
        A, B = self.A.to(output.device, output.dtype), self.B.to(output.device, output.dtype)
        if not A.requires_grad:  # moved once, and only now, when the model is where it computes
            self.A, self.B = A, B
        return output + linear(linear(hidden, A), B)


@contextmanager
def folded(layers: Mapping[str, LinearLayer], factors: Mapping[str, VectorFactors], switch: Switch) -> Iterator[None]:
    """Let each layer compute with `W + B A` while the switch says so. `W` itself is set aside and never written to.

    Raises:
        ValueError: If a layer's weight is trained, quantised or sharded.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name, vectors in factors.items():
            check_foldable({name: layers[name]})
            undo.append(_fold(name, layers[name], vectors, switch))
        yield
    finally:
        for action in undo:
            action()


def _fold(name: str, layer: LinearLayer, vectors: VectorFactors, switch: Switch) -> Callable[[], None]:
    base: Any = layer.base
    clean = base.weight
    exchanged: nn.Parameter | None = None  # made when it is first needed, where and in what the model computes by then

    def choose(outer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal exchanged
        if base.weight is not clean and base.weight is not exchanged:
            raise RuntimeError(
                f"The weight of `{name}` was replaced after training began, as FSDP does when it shards a model, so "
                "nothing can be folded into it. Leave out `fold`."
            )
        if switch.acts_in(outer) and exchanged is None:
            exchanged = _exchanged(base, vectors)
        # The parameter itself and not its data, so that what autograd has kept of the last step stays what it was.
        base.weight = exchanged if switch.acts_in(outer) else clean

    handle = layer.outer.register_forward_pre_hook(choose)

    def undo() -> None:
        handle.remove()
        if base.weight is exchanged:
            base.weight = clean

    return undo


def _exchanged(base: Any, vectors: VectorFactors) -> nn.Parameter:
    """Return `W + B A` as a frozen parameter, on the device and in the precision of `W`."""
    W = base.weight.detach()
    product = vectors.B.to(W.device, torch.float32) @ vectors.A.to(W.device, torch.float32)  # (d_out, d_in)
    product = product.mT if isinstance(base, Conv1D) else product
    return nn.Parameter((W.float() + product).to(W.dtype), requires_grad=False)


def check_foldable(layers: Mapping[str, LinearLayer]) -> None:
    """Make sure that vectors can be folded into layers.

    Args:
        layers (`Mapping[str, LinearLayer]`): The layers by name.

    Raises:
        ValueError: If a layer's weight is trained, quantised or sharded; says which.
    """
    for name, layer in layers.items():
        weight: Any = layer.base.weight
        stored = layer.shape[::-1] if isinstance(layer.base, Conv1D) else layer.shape
        if weight.requires_grad:
            problem = "its weight is being trained"
        elif (
            type(layer.base) not in (nn.Linear, Conv1D)
            or type(weight) is not nn.Parameter
            or tuple(weight.shape) != stored
        ):
            problem = f"its weight is quantised or sharded ({type(layer.base).__name__}, {type(weight).__name__})"
        else:
            continue
        raise ValueError(
            f"`fold` needs frozen weights that are stored whole, but in `{name}` {problem}. Leave out `fold`."
        )


def _forget_compiled_code() -> None:
    """Make `torch.compile` look again: it does not watch hooks, and would go on without those added since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
