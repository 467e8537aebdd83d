"""How far an adapter moves each layer from where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..analysis.drift import Subspaces
    from ..data import PromptSet


def layer_drift(model: Any) -> dict[str, float]:
    """Return ‖ΔW‖ / ‖W‖ (Frobenius) of every layer that the active LoRA adapter changes, by the layer's name.

    Computed from the factors: ΔW itself, d_out × d_in numbers, is never built.

    Args:
        model (`PeftModel`): With one active LoRA adapter.

    Raises:
        ValueError: If the adapter's update is no product of two factors (DoRA, prompt tuning, …).

    Example:

    ```python
    for layer, ratio in layer_drift(PeftModel.from_pretrained(base, "out/adapter")).items():
        print(f"{layer}: {100 * ratio:.2f} %")
    ```
    """
    import torch

    from ..linalg import product_norm_squared
    from ..lora.updates import lora_updates, weight

    drift = {}
    with torch.no_grad():
        for name, update in lora_updates(model, "The drift").items():
            start = weight(update.layer).float().norm()
            drift[name] = float(product_norm_squared(*update.factors()).sqrt() / start)
    return drift


def layer_shares(model: Any, subspaces: Subspaces) -> dict[str, dict[str, float]]:
    """Return for each known subspace the share of `‖ΔW‖²` in it, by the layer's name.

    Args:
        model (`PeftModel`): With one active LoRA adapter.
        subspaces (`Subspaces`): The alignment direction, and the subspaces of the safety features.

    Raises:
        ValueError: If the adapter's update is no product of two factors, or the subspaces do not fit the model.
    """
    import torch

    from ..analysis.drift import Factors
    from ..lora.updates import lora_updates

    shares: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, update in lora_updates(model, "The drift").items():
            held = subspaces.held(name, Factors(*update.factors()))
            whole = held.pop("all")
            for figure, inside in held.items():
                if whole > 0:
                    shares.setdefault(figure, {})[name] = inside / whole
    return shares


def refusals(model: Any, tokenizer: Any, sets: Sequence[PromptSet], system_prompt: str | None) -> dict[str, Tensor]:
    """Return the model's refusal direction by layer, from the harmful and the benign sets; empty without either."""
    from ..analysis.drift import refusal_directions

    harmful, harmless = (
        [prompt for prompt_set in sets if prompt_set.kind == kind for prompt in prompt_set.prompts]
        for kind in ("harmful", "benign")
    )
    if not harmful or not harmless:
        return {}
    return refusal_directions(model, tokenizer, harmful, harmless, system_prompt=system_prompt)


def refusals_kept(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return as a further figure by layer how much of the refusal direction is left; nothing where it is not known."""
    from ..analysis.drift import refusal_changes

    kept = {name: change.kept for name, change in refusal_changes(before, after).items()}
    return {"refusal": kept} if kept else {}
