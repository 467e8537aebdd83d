"""LoRA factors that are trained through a rule and stored plainly, as stock PEFT loads them.

A *rule* is a module for `torch.nn.utils.parametrize`: its `forward` makes a factor from what is trained, and its
`right_inverse` finds from a factor what to train. A forward pass, a merge, a penalty and every state dict see the
factor alone: PEFT saves and loads it as if there were no rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..linalg import outside
from .updates import LoraUpdate, whole

_TRAINED = "parametrizations.weight.original"
_FOREIGN = 0.02  # share of a factor in protected directions that no rounding explains, bfloat16's included


class _IncrementRule(nn.Module):
    """The rule of one factor.

    Args:
        basis (`Tensor`): Orthonormal columns that are protected, of shape (d, k); `k = 0` protects nothing.
        doubled (`bool`): Whether the factor holds a start. It is found in the factor that training begins with.
    """

    basis: Tensor
    start: Tensor | None

    def __init__(self, basis: Tensor, doubled: bool) -> None:
        super().__init__()
        self.doubled = doubled
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("start", None, persistent=False)

    def _check(self, columns: Tensor) -> None:
        share = (self.basis.mT @ columns).norm() / columns.norm().clamp(min=1e-30)
        if share > _FOREIGN:
            raise ValueError(
                f"{share:.0%} of one factor is in directions that are protected now, so it was trained with other "
                "protected directions, or with none. Give the basis, the `rank` and the `protect` that it was trained "
                "with, or start a new adapter: pass the base model and `peft_config`."
            )


class IncrementB(_IncrementRule):
    """The rule `dB -> [C dB, C B0]`, with `C = I − U Uᵀ` and `U` (d_out x k); not doubled, `B -> C B`."""

    def forward(self, increment: Tensor) -> Tensor:
        """Return the factor (d_out x 2r) for `dB` (d_out x r)."""
        # Autocast would round the product to bfloat16, and let that much of `dB` into the protected directions.
        with torch.autocast(increment.device.type, enabled=False):
            free = outside(whole(increment), self.basis)
            return (free if self.start is None else torch.cat([free, self.start], dim=1)).to(increment.dtype)

    def right_inverse(self, factor: Tensor) -> Tensor:
        """Return `C dB`, as good as `dB`, which only ever acts through `C`; keep the start."""
        self._check(factor.float())
        if not self.doubled:
            return factor.clone()
        increment, start = (half.clone(memory_format=torch.contiguous_format) for half in factor.detach().chunk(2, 1))
        self.start = outside(start.float(), self.basis)
        return increment


class IncrementA(_IncrementRule):
    """The rule `dA -> [A0 P + dA P ; dA P]`, with `P = I − V Vᵀ` and `V` (d_in x k); not doubled, `A -> A P`."""

    def forward(self, increment: Tensor) -> Tensor:
        """Return the factor (2r x d_in) for `dA` (r x d_in)."""
        with torch.autocast(increment.device.type, enabled=False):
            free = outside(whole(increment).mT, self.basis).mT
            return (free if self.start is None else torch.cat([self.start + free, free])).to(increment.dtype)

    def right_inverse(self, factor: Tensor) -> Tensor:
        """Return `dA P`; keep `A0 P`, which is what the upper half has before the lower."""
        self._check(factor.float().mT)
        if not self.doubled:
            return factor.clone()
        upper, increment = factor.detach().chunk(2)
        self.start = outside((upper.float() - increment.float()).mT, self.basis).mT
        return increment.clone()


def set_factors(update: LoraUpdate, left: Tensor, right: Tensor) -> None:
    """Overwrite the factors `B` (d_out x r) and `A` (r x d_in) of a LoRA layer."""
    with torch.no_grad():
        update.layer.lora_B[update.adapter].weight.copy_(left)
        update.layer.lora_A[update.adapter].weight.copy_(right)


@contextmanager
def trained_through(
    updates: Mapping[str, LoraUpdate], rules: Callable[[str], tuple[nn.Module, nn.Module]]
) -> Iterator[None]:
    """Train LoRA factors through rules for the length of a context; then they are plain again, with their values.

    `rules` makes those of `A` and of `B` for a layer; where a rule refuses a factor, here or when a state dict is
    loaded, the `ValueError` names the layer. The parameters stay the same objects, which an optimizer may know from
    before.
    """
    with ExitStack() as stack:
        for name, update in updates.items():
            factors = update.layer.lora_A[update.adapter], update.layer.lora_B[update.adapter]
            for factor, rule in zip(factors, rules(name), strict=True):
                stack.enter_context(_trained_through(factor, rule, name))
        yield


@contextmanager
def _trained_through(factor: nn.Linear, rule: Any, name: str) -> Iterator[None]:
    def as_plain(module: nn.Linear, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        del state_dict[prefix + _TRAINED]
        state_dict[prefix + "weight"] = module.weight.detach()

    def from_plain(module: nn.Linear, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            with _named(name):
                plain = state_dict.pop(prefix + "weight").to(module.weight.device)
                state_dict[prefix + _TRAINED] = rule.right_inverse(plain)

    with _named(name):  # unsafe only says that what is trained may have another shape than the factor
        parametrize.register_parametrization(factor, "weight", rule.to(factor.weight.device), unsafe=True)
    saving = factor.register_state_dict_post_hook(as_plain)
    loading = factor.register_load_state_dict_pre_hook(from_plain)
    ending = sys.is_finalizing
    try:
        yield
    finally:
        # Where the context was never left and Python itself ends, nobody is there to see the factors, and of the
        # modules that would make them plain, this one included, nothing may be left.
        if not ending():
            saving.remove()
            loading.remove()
            _make_plain(factor)


def _make_plain(factor: nn.Linear) -> None:
    original = factor.get_parameter(_TRAINED)
    original.grad = None  # of the inner shape; left over from an interrupted step
    if not isinstance(original, DTensor):
        parametrize.remove_parametrizations(factor, "weight")
        return
    # A sharded parameter cannot take another shape: the factor becomes a new one, complete in every process.
    plain = factor.weight.detach()
    parametrize.remove_parametrizations(factor, "weight", leave_parametrized=False)
    factor.weight = nn.Parameter(plain, requires_grad=original.requires_grad)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The LoRA factors of `{name}` cannot be trained on: {error}") from error
