"""The drift of a model in memory: of each adapter in a comparison, and while training goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..artifacts.alignment_direction import AlignmentDirection
from ..artifacts.safety_basis import SafetyBasis
from ..distributed import on_first_process
from ..evaluation.state import is_due, log_between, watchable
from ..lora.updates import FullUpdate, Update, linear_layers, lora_updates, updates, weight, whole
from .drift import RANK, SHARES, Drift, Subspaces
from .refusal_direction import refusal_changes, refusal_directions

if TYPE_CHECKING:
    from ..data import PromptSet

logger = logging.getLogger(__name__)

_COVERED = 0.9  # share of the trained weights below which what is not measured is logged


class DriftFigures:
    """Measures the drift of each adapter that [`compare`] puts on the model, for its `drift` argument.

    Args:
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): For the share along the alignment direction.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): For the shares in the safety features' subspaces.
        rank (`int`, *optional*, defaults to `16`): Top directions of each subspace.
        prompt_sets (`Sequence[PromptSet]`, *optional*): Harmful and benign prompts, for the share of the refusal
            direction that each adapter keeps; without both kinds it is not measured.
        system_prompt (`str`, *optional*): System turn before each prompt.

    Raises:
        ValueError: If `rank` is below 1, or a file is corrupted.

    Example:

    ```python
    comparison = compare(model, tokenizer, sets, {"AsFT": "out"}, drift=DriftFigures(basis="basis.safetensors"))
    ```
    """

    def __init__(
        self,
        direction: AlignmentDirection | str | Path | None = None,
        basis: SafetyBasis | str | Path | None = None,
        rank: int = RANK,
        *,
        prompt_sets: Sequence[PromptSet] = (),
        system_prompt: str | None = None,
    ) -> None:
        self._subspaces = Subspaces.load(direction, basis, rank)
        self._system_prompt = system_prompt
        self._prompts = [
            [turns for prompt_set in prompt_sets if prompt_set.kind == kind for turns in prompt_set.conversations()]
            for kind in ("harmful", "benign")
        ]
        self._before: dict[str, Tensor] = {}

    def __call__(self, model: Any, tokenizer: Any, adapter: str | Path | None) -> dict[str, dict[str, float]]:
        """Measure the base model (`adapter=None`), or the model with an adapter active, given by its folder or Hub id.

        Returns:
            `dict[str, dict[str, float]]`: By figure, a value for each layer: `"relative"` is `‖ΔW‖ / ‖W‖`, the others
            are shares. Empty for the base; no sizes and shares of an adapter that is not a plain LoRA.
        """
        refusal: dict[str, Tensor] = {}
        if all(self._prompts):
            refusal = refusal_directions(model, tokenizer, *self._prompts, system_prompt=self._system_prompt)
        if adapter is None:
            self._before = refusal
            return {}
        try:
            updates = lora_updates(model, "The drift")
        except ValueError as error:  # an adapter of a kind whose update is no product of two factors
            logger.info("`%s`: its drift by layer is not measured: %s", adapter, error)
            updates = {}
        drift = _drift(self._subspaces, updates, lambda name: _norm(updates[name].layer))
        found = {name: drift.figure(name) for name in ("relative", *SHARES)}
        found["refusal"] = {name: change.kept for name, change in refusal_changes(self._before, refusal).items()}
        return {name: values for name, values in found.items() if values}


class DriftMonitor(TrainerCallback):
    """Measures every few steps how far training has moved the weights, and writes it into the trainer's logs.

    An ordinary callback of any [`~transformers.Trainer`]. It logs `drift/relative` (`‖ΔW‖ / ‖W‖` of all trained layers
    together), `drift/largest` (that of the layer which moved most), and, where the subspaces are given,
    `drift/alignment`, `drift/outputs` and `drift/inputs`: shares of the update, each with that of a random update of
    the same sizes (`…_random`). Full fine-tuning keeps a copy of the weights that are trained.

    All is measured from the model that the trainer was built with, also when a run resumes from a checkpoint. On
    several processes each needs the monitor.

    Args:
        trainer (`transformers.Trainer`): The trainer that it watches; its `log` is what it writes to.
        every (`int`, *optional*, defaults to `50`): Optimizer steps between measurements; the last step is measured
            too.
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): For the share along the alignment direction.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): For the shares in the safety features' subspaces.
        rank (`int`, *optional*, defaults to `16`): Top directions of each subspace.

    Raises:
        ValueError: If `every` or `rank` is below 1, the update is no product of two factors, the directions belong to
            another model, or training is spread by FSDP1, ZeRO-3 or tensor parallelism.

    Example:

    ```python
    trainer = SFTTrainer(model, train_dataset=rows, peft_config=LoraConfig())
    trainer.add_callback(DriftMonitor(trainer, every=25, direction="direction.safetensors"))
    trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Any,
        every: int = 50,
        *,
        direction: AlignmentDirection | str | Path | None = None,
        basis: SafetyBasis | str | Path | None = None,
        rank: int = RANK,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every}.")
        self.trainer, self.every = trainer, every
        self._subspaces = Subspaces.load(direction, basis, rank)
        self._strategy = watchable(trainer, "The drift monitor", "safe-trainer drift")
        self._updates: dict[str, Update] = {}
        self._layers: list[nn.Module] = []
        self._sizes: dict[str, float] = {}  # ‖W‖
        self._measured = -1
        self._start()  # now, because when training begins a checkpoint may have been loaded

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the copy of the start to where the weights are."""
        self._measured = -1
        if not set(self.trainer.model.modules()).issuperset(self._layers):
            self._start()  # the trainer has made itself another model
        for update in self._full():
            update.place()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps, and after the last, before the best model may take its place."""
        if is_due(state, self.every):
            self._measure(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end, and move the copy of the start off the accelerator."""
        if self._measured != state.global_step:
            self._measure(state.global_step)
        for update in self._full():
            update.start = update.start.cpu()

    def _full(self) -> list[FullUpdate]:
        return [update for update in self._updates.values() if isinstance(update, FullUpdate)]

    def _start(self) -> None:
        """Keep what training starts from; where sharding will spread it, one process's copy is enough."""
        model = self.trainer.model
        will_split = self._strategy.is_sharded and not any(isinstance(p, DTensor) for p in model.parameters())
        copied = not will_split or self.trainer.is_world_process_zero()
        self._updates = updates(model, "The drift monitor", copied=copied)
        layers = linear_layers(model)
        self._subspaces.check(layers)
        self._layers = [layers[name].outer for name in self._updates]

        def sizes() -> dict[str, float]:
            return {name: _norm(layers[name].outer) for name in self._updates}

        self._sizes = on_first_process(sizes) if will_split else sizes()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ours = sum(p.numel() for layer in self._layers for p in layer.parameters() if p.requires_grad)
        if ours < _COVERED * trained:
            logger.warning(
                "The drift monitor measures linear layers, which are %.0f %% of the trained weights; embeddings, the "
                "output head and experts are not measured.",
                100 * ours / trained,
            )

    def _measure(self, step: int) -> None:
        self._measured = step
        drift = _drift(self._subspaces, self._updates, self._sizes.__getitem__)
        # Over all layers, also those that have not moved.
        moved, start = (math.hypot(*(getattr(x, part) for x in drift.layers.values())) for part in ("size", "weight"))
        largest = max(drift.figure("relative").values(), default=0.0)
        values = {"drift/relative": moved / start, "drift/largest": largest}
        for name in SHARES:
            if share := drift.share(name):
                values[f"drift/{name}"], values[f"drift/{name}_random"] = share
        log_between(self.trainer, values)


@torch.no_grad()
def _drift(subspaces: Subspaces, updates: Mapping[str, Update], size: Callable[[str], float]) -> Drift:
    return Drift(subspaces.measure(((name, update.factors()) for name, update in updates.items()), size))


def _norm(layer: Any) -> float:
    return whole(weight(layer).float().square().sum()).sqrt().item()
