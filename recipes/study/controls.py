"""What the study measures next to the library's methods: controls of the refusal anchor, and an average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safe_trainer import PromptSet, RefusalAnchor
from safe_trainer.artifacts.own_answers import Anchor, OwnAnswers
from safe_trainer.data.protection import protection_prompts
from safe_trainer.evaluation.prompting import encode, left_padded
from safe_trainer.lora.modes import evaluation_mode, without_adapters
from safe_trainer.methods.base import PenaltyMethod, SafetyMethod


@dataclass
class BenignAnchorsOnly(RefusalAnchor):
    """The counterweight alone: no refusal is held."""

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean over benign prompts."""
        return {kind: mean for kind, mean in super().terms(model).items() if kind == "avoided"}


@dataclass
class ReferencesOfOthers(RefusalAnchor):
    """Each harmful prompt is held to what the start says of another one."""

    def _measured(self, model: Any, tokenizer: Any, sets: dict[str, PromptSet]) -> tuple[OwnAnswers, list[Anchor]]:
        answers, avoided = super()._measured(model, tokenizer, sets)
        held = []
        for own, other in zip(answers.anchors, [*answers.anchors[1:], answers.anchors[0]], strict=True):
            prompt = own.ids[: len(own.ids) - own.positions + 1]
            held.append(other._replace(ids=(*prompt, *other.ids[len(other.ids) - other.positions + 1 :])))
        return answers._replace(anchors=held), avoided


@dataclass
class HiddenStateAnchor(PenaltyMethod):
    """SBR as published (arXiv 2605.05995): `λ · MSE` of the last hidden state at the end of harmful prompts."""

    weight: float = 50.0
    count: int = 8
    _inputs: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _start: Tensor = field(default_factory=lambda: torch.empty(0), init=False, repr=False, compare=False)

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Keep what the start model makes of the prompts."""
        prompts = protection_prompts("harmful", model.config._name_or_path).first(self.count).prompts
        self._inputs = dict(left_padded(encode(model, tokenizer, prompts), model.device, tokenizer.pad_token_id))
        with without_adapters(model), torch.no_grad():
            self._start = self._hidden(model)

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean squared distance to the start."""
        return {"hidden": mse_loss(self._hidden(model), self._start)}

    def _hidden(self, model: nn.Module) -> Tensor:
        with evaluation_mode(model):
            return model(**self._inputs, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1]


@dataclass
class AveragedWeights(SafetyMethod):
    """Delivers an exponential moving average of what was trained (arXiv 2508.12531), in place of its last value.

    A method, as runs of the study take them; users take the callback `AdapterEMA`.
    """

    decay: float = 0.99
    _average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Replace what was trained by its average at the end."""
        yield
        with torch.no_grad():
            for name, weight in self._trained(model):
                weight.copy_(self._average[name])

    def after_backward(self, model: nn.Module) -> None:
        """Take the weights of the step before into the average."""
        with torch.no_grad():
            for name, weight in self._trained(model):
                self._average.setdefault(name, weight.clone()).lerp_(weight, 1 - self.decay)

    @staticmethod
    def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
