"""`SafeSFTTrainer`: TRL's `SFTTrainer` with safety methods, and nothing else changed."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from . import checkpoints, resuming
from .distributed import strategy_of
from .lora.modes import trainable_layout
from .methods.base import SafetyMethod
from .methods.recommended import RECOMMENDED, recommended_for
from .stopping import stopping

logger = logging.getLogger(__name__)


class SafeSFTTrainer(SFTTrainer):
    """Fine-tune with TRL while the model's refusals are protected by one or several safety methods.

    A drop-in for [`~trl.SFTTrainer`]: every argument of TRL's trainer works as it does there, and with `safety=None`
    losses and weights are the same to the last bit.

    Args:
        *args, **kwargs:
            Everything that [`~trl.SFTTrainer`] takes, unchanged: `model`, `args` (TRL's own `SFTConfig`),
            `train_dataset`, `eval_dataset`, `peft_config` and so on.
        safety ([`SafetyMethod`] or list of them or `"recommended"`, *optional*):
            The methods that protect the model, such as [`AsFT`]. A list runs each moment in its order. `"recommended"`
            is [`recommended`] with the harmful rows that the model brings along; for a model that brings none, give
            `recommended("harmful.jsonl")`. `None` is plain `SFTTrainer`.

    Attributes:
        safety_methods (`list[SafetyMethod]`): The methods in order; empty without any.
        resume_command (`str`): What is told to go on with after a run was stopped.

    Raises:
        TypeError: If `safety` holds something that is not a [`SafetyMethod`].
        ValueError: If the same method is given twice, or a method does not fit the model, its PEFT
            configuration, or the way in which it is spread over processes.

    The sum of all penalties is logged as `safety_penalty`; what the methods can say about the finished run is logged
    once more when `train()` ends. Their settings are saved with each checkpoint, and a run that goes on from it with
    others, or on another number of processes, is refused. `train(resume_from_checkpoint=True)` goes on from the last
    checkpoint that is whole: not cut short by a kill or a full disk, and by its checksums not damaged since.

    Ctrl-C and SIGTERM, which a cluster's scheduler sends, finish the step and save a checkpoint, unless a handler of
    your own or `enable_jit_checkpoint=True` has taken them; a second Ctrl-C stops at once.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from safe_trainer import AsFT, SafeSFTTrainer

    trainer = SafeSFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        safety=AsFT(unaligned_model="Qwen/Qwen2.5-0.5B"),
    )
    trainer.train()
    ```
    """

    resume_command = "trainer.train(resume_from_checkpoint=True)"

    def __init__(
        self,
        *args: Any,
        safety: SafetyMethod | Sequence[SafetyMethod] | Literal["recommended"] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build TRL's trainer, with each method's settings applied before and the method attached after."""
        if isinstance(safety, str) and safety == RECOMMENDED:
            given = inspect.signature(SFTTrainer).bind(*args, **kwargs).arguments
            safety = recommended_for(given["model"])
        self.safety_methods = _as_methods(safety)
        self._record = checkpoints.Record([])
        if not self.safety_methods:
            super().__init__(*args, **kwargs)
            return
        # Bound by name, because `peft_config` may have come by position and is adapted before TRL sees it.
        arguments = inspect.signature(SFTTrainer).bind(*args, **kwargs).arguments
        peft_config = copy.deepcopy(arguments.get("peft_config"))
        for method in self.safety_methods:
            peft_config = method.adapt_peft_config(peft_config)
        arguments["peft_config"] = peft_config
        # TRL reads these three when it writes tags and the model card.
        self._tag_names = [*SFTTrainer._tag_names, "safe-trainer", *(method.tag for method in self.safety_methods)]
        self._name = f"{SFTTrainer._name} with {' and '.join(method.name for method in self.safety_methods)}"
        self._paper = _card_paper(self.safety_methods)
        super().__init__(**arguments)
        strategy = strategy_of(self.accelerator, self.model)
        for method in self.safety_methods:
            method.check_strategy(strategy)
        for method in self.safety_methods:
            method.attach(self.model, self._tokenizer, self.train_dataset)
        self._record = checkpoints.Record(self.safety_methods, strategy, self.accelerator.num_processes)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~trl.SFTTrainer`] does, with every method's `training` context around it.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when the step is finished, its checkpoint saved and the methods are left.
            SystemExit: So after SIGTERM.
        """
        resumed = resuming.agreed_checkpoint(resume_from_checkpoint, self.args.output_dir, self._record, self.model)
        with stopping(self, self.resume_command) as stopper, ExitStack() as stack:
            if self.safety_methods:  # without, evaluation spoils gradients of 4 bits on a CPU as it does in TRL
                stack.enter_context(trainable_layout(self.model))
            for method in self.safety_methods:
                stack.enter_context(method.training(self.model))
            self._is_loaded = self._load_before_sharding(resumed)
            output = super().train(resumed, *args, **kwargs)
            if stopper.lacks_checkpoint(self):
                self._save_checkpoint(self.model, trial=None)
            diagnostics: dict[str, float] = {}
            for method in self.safety_methods:
                diagnostics.update(method.diagnostics(self.model))
        if diagnostics:
            self.log(diagnostics)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch as [`~trl.SFTTrainer`] does, unless the run goes on from its last step.

        Transformers looks for the end behind a step only, and would take one step more than it was to.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_before_sharding(self, checkpoint: str | bool | None) -> bool:
        """With FSDP, load the adapter to go on from while it is whole, and return whether that was done.

        Once weights are split, accelerate looks for parameters by the names in the checkpoint, which a parameter that
        is trained through a rule does not have.
        """
        is_split = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if not (checkpoint and self.safety_methods and self.is_fsdp_enabled and isinstance(self.model, PeftModel)):
            return False
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        if is_split or folder is None or not os.path.isfile(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
            return False
        weights = load_peft_weights(folder, device="cpu")
        set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapters[0])
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load as [`~trl.SFTTrainer`] does, unless it has been done; TRL has no public place for it."""
        if not getattr(self, "_is_loaded", False):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return TRL's loss, plus the methods' penalties while training."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self.safety_methods and self.model.training):
            return result
        loss, outputs = result if return_outputs else (result, None)
        penalties = [p for method in self.safety_methods if (p := method.penalty(self.model)) is not None]
        if penalties:
            penalty = torch.stack(penalties).sum()
            self._log_penalty(penalty)
            # As TRL does with the auxiliary loss of mixtures of experts: with `num_items_in_batch` the loss itself
            # carries the accumulation, without it `training_step` divides the whole by the number of micro-batches.
            # Every process adds the same penalty and gradients are averaged over processes, so it counts once. Before
            # `train()` has counted its first batches, a batch stands for itself.
            accumulation = getattr(self, "current_gradient_accumulation_steps", 1)
            steps = accumulation if num_items_in_batch is not None else 1
            loss = loss + penalty / steps
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Semi-private, and TRL overrides it as well: there is no public moment before a checkpoint is written.
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        is_uploaded = self.args.push_to_hub and "checkpoint" in str(self.args.hub_strategy)
        with checkpoints.saving(folder, self._record, self.args.should_save, with_checksums=not is_uploaded):
            super()._save_checkpoint(model, trial)

    def _log_penalty(self, penalty: Tensor) -> None:
        value = penalty.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The safety penalty became {value} at step {self.state.global_step}. Checkpoints saved so far in "
                f"`{self.args.output_dir}` are intact; go on from the last one with a lower `learning_rate`."
            )
        self._metrics["train"]["safety_penalty"].append(value)


def _as_methods(safety: Any) -> list[SafetyMethod]:
    methods = [] if safety is None else list(safety) if isinstance(safety, (list, tuple)) else [safety]
    for method in methods:
        if isinstance(method, type):
            raise TypeError(f"`safety` takes methods, not classes: write `{method.__name__}(...)` with its settings.")
        if not isinstance(method, SafetyMethod):
            raise TypeError(
                f"`safety` takes a method, a list of them, {RECOMMENDED!r} or None, got {type(method).__name__} "
                f"({method!r}). "
                "Example: `safety=AsFT(unaligned_model=...)`."
            )
    names = [type(method).__name__ for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`safety` holds {name} {names.count(name)} times. Give each method once.")
    return methods


def _card_paper(methods: Sequence[SafetyMethod]) -> dict[str, str]:
    papers = [method.paper for method in methods if method.paper is not None]
    if not papers:
        return {}
    citation = "\n\n".join(paper.citation for paper in papers)  # TRL's card has room for one title, but all citations
    return {"title": papers[0].title, "id": papers[0].arxiv, "citation": citation}
