"""`measure_drift`: what a fine-tune changed, layer by layer, and what of it touches safety."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts import AlignmentDirection, SafetyBasis
from .refusals import RefusalChange, refusal_changes, refusal_directions
from .subspaces import FIGURES, RANK, Subspaces
from .updates import Start, is_adapter, is_plain, merged_updates, updates_of


@dataclass(frozen=True)
class LayerDrift:
    """What a fine-tune did to one linear layer, or to the residual stream after one block.

    Args:
        size (`float`): `‖ΔW‖_F`; NaN for a block.
        weight (`float`): `‖W‖_F` of the base model; NaN for a block.
        shares (`Mapping[str, float]`): Of `‖ΔW‖²`, by subspace: `"alignment"`, `"outputs"`, `"inputs"`.
        expected (`Mapping[str, float]`): What a random update would show there.
        refusal ([`RefusalChange`], *optional*): Of the layer's outputs.
    """

    size: float = math.nan
    weight: float = math.nan
    shares: Mapping[str, float] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)
    refusal: RefusalChange | None = None

    @property
    def relative(self) -> float:
        """Return `‖ΔW‖ / ‖W‖`."""
        return self.size / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class Drift:
    """What a fine-tune changed in a model, by layer; made by [`measure_drift`].

    Args:
        layers (`Mapping[str, LayerDrift]`): By the name in the base model. Layers that did not change stand there only
            where their outputs were looked at.
        provenance (`Mapping[str, Any]`): Both models, and the settings.
    """

    layers: Mapping[str, LayerDrift]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """Return `‖ΔW‖ / ‖W‖` of all changed layers together."""
        changed = [layer for layer in self.layers.values() if layer.size > 0]
        return math.hypot(*(x.size for x in changed)) / math.hypot(*(x.weight for x in changed)) if changed else 0.0

    def share(self, figure: str) -> tuple[float, float] | None:
        """Return the share of the whole update in a subspace, and that of a random update of the same sizes.

        Args:
            figure (`str`): `"alignment"`, `"outputs"` or `"inputs"`.

        Returns:
            `tuple[float, float]` or `None`: Over the layers whose subspace is known; `None` if there is none.
        """
        known = [layer for layer in self.layers.values() if figure in layer.shares]
        whole = sum(layer.size**2 for layer in known)
        if not whole:
            return None
        found = sum(layer.size**2 * layer.shares[figure] for layer in known)
        return found / whole, sum(layer.size**2 * layer.expected[figure] for layer in known) / whole

    def figure(self, name: str) -> dict[str, float]:
        """Return one figure by layer: `"relative"`, a subspace, or `"refusal"`, the share of its direction kept."""
        if name == "relative":
            return {key: layer.relative for key, layer in self.layers.items() if layer.size > 0}
        if name == "refusal":
            return {key: layer.refusal.kept for key, layer in self.layers.items() if layer.refusal is not None}
        return {key: layer.shares[name] for key, layer in self.layers.items() if name in layer.shares}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        shares = {name: self.share(name) for name in FIGURES}
        return {
            "relative": self.relative,
            "shares": {
                name: dict(zip(("found", "random"), found, strict=True)) for name, found in shares.items() if found
            },
            "layers": {name: _row(layer) for name, layer in self.layers.items()},
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        return path


def measure_drift(  # noqa: PLR0913, each is a setting with a name
    base: str | Path,
    tuned: str | Path,
    *,
    direction: AlignmentDirection | str | Path | None = None,
    basis: SafetyBasis | str | Path | None = None,
    rank: int = RANK,
    prompts: tuple[Sequence[str], Sequence[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drift:
    """Measure what any fine-tune changed: an adapter or a whole model against its base, made by us or not.

    Both are read from disk layer by layer; the update of a LoRA is never multiplied out, and of a whole model one
    layer's is in memory at a time. Only `prompts` load the two models, one after the other; and an adapter of another
    kind, as DoRA, is merged into its base. Linear layers are counted: no embeddings, norms and output head.

    Args:
        base (`str` or `Path`): The model before fine-tuning: a folder or a Hub id.
        tuned (`str` or `Path`): An adapter on it, or the whole model after fine-tuning.
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): For the share along the alignment direction:
            that in the span of its leading left singular vectors.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): For the shares in the safety features' subspaces, of the
            layers' outputs and inputs.
        rank (`int`, *optional*, defaults to `16`): Top directions of each subspace. Every share stands beside that
            of a random update, which is `rank` over the size of the layer.
        prompts (`tuple[Sequence[str], Sequence[str]]`, *optional*): Harmful and harmless prompts, for the change of
            the refusal direction; see [`refusal_directions`].
        progress (`Callable[[int, int], None]`, *optional*): Called with (done, total) layers.

    Raises:
        OSError: If a checkpoint is not there.
        ValueError: If the adapter changes no weights, or something does not fit the base.

    Example:

    ```python
    drift = measure_drift("Qwen/Qwen2.5-0.5B-Instruct", "out", direction="direction.safetensors")
    print(f"{drift.relative:.2%} of the weights' size, shares {drift.share('alignment')} (found, random)")
    ```
    """
    start, subspaces = Start(base), Subspaces.load(direction, basis, rank)
    subspaces.check(start.shapes)
    layers: dict[str, LayerDrift] = {}
    total = len(start.shapes)
    is_other = is_adapter(tuned) and not is_plain(tuned)
    updates = merged_updates(base, tuned, start) if is_other else updates_of(tuned, start, start.shapes)
    for done, (name, update) in enumerate(updates, start=1):
        held = subspaces.held(name, update)
        whole = held.pop("all")
        shares = {figure: value / whole for figure, value in held.items()} if whole else {}
        layers[name] = LayerDrift(math.sqrt(whole), start(name).norm().item(), shares, subspaces.expected(name))
        if progress is not None:
            progress(done, total)
    if prompts is not None:
        _add_refusals(layers, base, tuned, *prompts)
    order = {name: number for number, name in enumerate(start.shapes)}  # the model's, then its blocks
    ordered = dict(sorted(layers.items(), key=lambda item: order.get(item[0], len(order))))
    return Drift(ordered, {"base": str(base), "tuned": str(tuned), "rank": rank})


def _add_refusals(
    layers: dict[str, LayerDrift], base: str | Path, tuned: str | Path, harmful: Sequence[str], harmless: Sequence[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, device_map="auto")
    before = refusal_directions(model, tokenizer, harmful, harmless)
    if is_adapter(tuned):
        model = PeftModel.from_pretrained(model, str(tuned))
    else:
        del model  # one at a time
        model = AutoModelForCausalLM.from_pretrained(tuned, device_map="auto")
    after = refusal_directions(model, tokenizer, harmful, harmless)
    for name, change in refusal_changes(before, after).items():
        old = layers.get(name, LayerDrift())
        layers[name] = LayerDrift(old.size, old.weight, old.shares, old.expected, change)


def _row(layer: LayerDrift) -> dict[str, Any]:
    found: dict[str, Any] = {"shares": dict(layer.shares), "random": dict(layer.expected)}
    if layer.size > 0:
        found |= {"size": layer.size, "relative": layer.relative}
    if layer.refusal is not None:
        found["refusal"] = layer.refusal._asdict() | {"kept": layer.refusal.kept}
    return found
