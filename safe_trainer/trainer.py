"""`SafeSFTTrainer`: TRL's `SFTTrainer` with safety methods, and nothing else changed."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import find_adapter_config_file, is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from .checkpoints import RunFingerprint, damaged, graceful_stop, resolve_checkpoint, saving
from .data import OTHER_TEMPLATE, between_turns, labelled_harmful, lost_turns
from .distributed import strategy_of
from .lora.io import harmful_mark, note_commit, vectors_in
from .lora.loading import refuse_adapter
from .lora.modes import check_known_adapters, check_trained, trainable_layout, trained_modules
from .methods.base import Attendance, SafetyMethod, check_report, describe_report, overrides
from .methods.recommended import RECOMMENDED, recommended_for

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # rows of a stream


class SafeSFTTrainer(SFTTrainer):
    """Fine-tune with TRL while the model's refusals are protected by one or several safety methods.

    A drop-in for [`~trl.SFTTrainer`]: every argument of TRL's trainer works as it does there, and with `safety=None`
    it is TRL's trainer; an adapter's folder and security vectors are still refused as a model, and rows that teach
    nothing still counted, but not a stream's. Only where the machine refuses TRL's default arguments, bfloat16 on a
    GPU, are those of a trainer without `args` others: it then trains in float32, on the CPU if there is no
    accelerator, and says so.

    Args:
        *args, **kwargs: Everything that [`~trl.SFTTrainer`] takes, unchanged.
        safety ([`SafetyMethod`] or list of them or `"recommended"`, *optional*): The methods that protect the model,
            such as [`AsFT`], each moment in the order of the list. `"recommended"` is [`recommended`] with the prompts
            and rows that the model brings along, or built-in ones.

    Attributes:
        safety_methods (`list[SafetyMethod]`): The methods in order; empty without any.
        safety_report (`dict`): By method, what it measured of its own protection when it was attached: `coverage`
            (share of the trained weights that it acts on), `figures`, `warnings`. JSON.
        resume_command (`str`): The command that messages name to resume a run that was stopped.
        stops_gracefully (`bool`): Whether Ctrl-C and SIGTERM finish the step and save a checkpoint, unless your own
            handler or `enable_jit_checkpoint=True` has taken them; a second Ctrl-C stops at once. On with methods.

    Raises:
        TypeError: If `safety` holds something that is not a [`SafetyMethod`].
        ValueError: If the same method is given twice, or a method does not fit the model, its PEFT configuration or
            the distributed strategy.

    The sum of all penalties is logged as `safety_penalty`. A checkpoint holds the methods' settings, and a run that
    resumes from it with others, or on another number of processes, is refused.

    Example:

    ```python
    config = LoraConfig(target_modules="all-linear")
    safety = AsFT(unaligned_model="Qwen/Qwen2.5-0.5B")
    trainer = SafeSFTTrainer("Qwen/Qwen2.5-0.5B-Instruct", train_dataset=rows, peft_config=config, safety=safety)
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
        # Bound by name, because `peft_config` may have come by position and is adapted before TRL sees it.
        arguments = inspect.signature(SFTTrainer).bind(*args, **kwargs).arguments
        if arguments.get("args") is None and (changed := machine_defaults()):
            arguments["args"] = _default_arguments(arguments["model"], changed)
        name, source = arguments["model"], getattr(arguments.get("args"), "model_init_kwargs", None) or {}
        revision = source.get("revision") if isinstance(name, str) else None
        if isinstance(safety, str) and safety == RECOMMENDED:
            safety = recommended_for(name, revision=revision)
        self.safety_methods = _as_methods(safety)
        self.safety_report: dict[str, dict[str, Any]] = {}
        self.stops_gracefully = bool(self.safety_methods)
        self._fingerprint = RunFingerprint()
        self._attendance = Attendance(self.safety_methods, type(self).__name__)
        _refuse_adapters(arguments["model"], source if arguments.get("peft_config") is not None else None)
        if not self.safety_methods:
            super().__init__(**arguments)
            _refuse_adapters(self.model)  # which may have come from the Hub
            self._check_rows(arguments)
            return
        if isinstance(arguments["model"], nn.Module):
            check_known_adapters(arguments["model"])
        arguments["peft_config"] = self._adapted(arguments.get("peft_config"), revision)
        # TRL reads these three when it writes tags and the model card.
        self._tag_names = [*SFTTrainer._tag_names, "safe-trainer", *(method.tag for method in self.safety_methods)]
        self._name = f"{SFTTrainer._name} with {' and '.join(method.name for method in self.safety_methods)}"
        self._paper = _card_paper(self.safety_methods)
        super().__init__(**arguments)
        _refuse_adapters(self.model)
        if isinstance(name, str):
            note_commit(self.model, name, revision, source.get("cache_dir"))
        check_trained(self.model)
        self._check_rows(arguments)
        self._check_token_weights()
        strategy = strategy_of(self.accelerator, self.model)
        for method in self.safety_methods:
            method.check_strategy(strategy)
        self._attached = trained_modules(self.model)
        for method in self.safety_methods:
            method.attach(self.model, self._tokenizer, self.train_dataset)
            method.attached_to = self._attached
            self.safety_report[method.name] = check_report(method, self.model)
        if self.is_world_process_zero():
            _log_report(self.safety_report)
        self._fingerprint = RunFingerprint(self.safety_methods, strategy, self.accelerator.num_processes)
        self.add_callback(self._fingerprint)
        self.add_callback(self._attendance)

    def _adapted(self, peft_config: PeftConfig | None, revision: str | None) -> PeftConfig | None:
        """Return a copy of the configuration as methods want it, with the revision to load the base model of again."""
        peft_config = copy.deepcopy(peft_config)
        for method in self.safety_methods:
            peft_config = method.adapt_peft_config(peft_config)
        if peft_config is not None and revision is not None:
            peft_config.revision = revision
        return peft_config

    def _check_rows(self, given: Mapping[str, Any]) -> None:
        """Report rows that are labelled harmful, and that lose a turn in the chat template."""
        stream = given.get("train_dataset")
        is_stream = isinstance(stream, IterableDataset) and bool(self.safety_methods)
        rows = _first_rows(stream) if is_stream else stream
        if isinstance(rows, Dataset):
            if harmful := labelled_harmful(rows):
                logger.warning(
                    "%d of %d rows of `train_dataset`%s are labelled harmful, and are learned. Leave them out, as "
                    "with `load_rows(..., ReadOptions(where={'is_safe': True}))`.",
                    *(harmful, len(rows), " looked at" if is_stream else ""),
                )
            # Semi-private: images, and rows to be taken as they are, which TRL does not bring into the template.
            as_they_are = self._skip_prepare_dataset or given.get("formatting_func") is not None
            if self.safety_methods and not (as_they_are or "input_ids" in rows.column_names):
                if lost := lost_turns(self._tokenizer, rows, is_start=is_stream, chat_template=self.chat_template):
                    logger.warning("`train_dataset`: %s %s", lost, OTHER_TEMPLATE)
        if self.safety_methods and not self._skip_prepare_dataset:
            self._check_template()

    def _check_template(self) -> None:
        """Report rows that are trained without the chat template, in which methods fit, hold and ask."""
        marker = between_turns(self._tokenizer)
        if (
            not marker or _joins(self.args, self.args.packing) or self.args.truncation_mode == "keep_end"
        ):  # where a row may lack its beginning
            return
        first = list(islice(self.train_dataset, _LOOKED_AT))
        texts = ("".join(self._tokenizer.decode(row["input_ids"]).split()) for row in first)
        if without := sum(marker not in text for text in texts):
            logger.warning(
                "%d of %d rows of `train_dataset` looked at are trained without the chat template, in which the "
                "methods protect the model: outside it they hold less, and harmful rows teach more. Give rows as "
                "`messages`, or with turns as `prompt` and `completion`, such as `load_rows` returns them.",
                *(without, len(first)),
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Prepare rows as [`~trl.SFTTrainer`] does, and report those of whose answers `max_length` leaves no token."""
        # Semi-private, and what all rows go through: those for training, for evaluation, and handed to `evaluate`.
        prepare = partial(super()._prepare_dataset, formatting_func=formatting_func, dataset_name=dataset_name)
        prepared = prepare(dataset, processing_class, args, packing)
        is_stream = isinstance(dataset, IterableDataset)
        joins = _joins(args, packing)
        if is_stream and self.safety_methods and not joins:  # prepared as it comes, so the first rows are once more
            first = dataset.take(_LOOKED_AT)
            total, left = (sum(1 for _ in rows) for rows in (first, prepare(first, processing_class, args, False)))
        elif isinstance(dataset, Dataset) and isinstance(prepared, Dataset):
            total = len(dataset)
            if joins:  # at least one must have a token to learn
                left = total * any(label != -100 for row in prepared for label in row["labels"])
            elif packing or args.max_length is None:  # which leave rows in of which nothing is learned
                left = sum(_learned(row) for row in prepared.with_format("numpy"))
            else:
                left = len(prepared)
        else:
            return prepared
        masked = "labels" in get_dataset_column_names(dataset)
        _report_left(dataset_name, total, left, args.max_length, is_stream, masked)
        return prepared

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~trl.SFTTrainer`] does, with every method's `training` context around it.

        Raises:
            ValueError: If the checkpoint to resume from is incomplete, or was made with other methods or settings; if
                a method was given to another trainer since, other weights are trained than when it was attached, or a
                subclass leaves out what methods act in.
            KeyboardInterrupt: After Ctrl-C, when the step is finished, its checkpoint saved and the methods are left.
            SystemExit: So after SIGTERM.
        """
        self._check_attached()
        where, template = self.args.output_dir, getattr(self._tokenizer, "chat_template", None)
        resumed = resolve_checkpoint(resume_from_checkpoint, where, self._fingerprint, self.model, template)
        with ExitStack() as stack:
            stop = stack.enter_context(graceful_stop(self, self.resume_command)) if self.stops_gracefully else None
            if self.safety_methods:  # without, evaluation spoils gradients of 4 bits on a CPU as it does in TRL
                stack.enter_context(trainable_layout(self.model))
            for method in self.safety_methods:
                stack.enter_context(method.training(self.model))
            self._is_loaded = self._load_before_sharding(resumed)
            output = super().train(resumed, *args, **kwargs)
            if stop is not None and stop.lacks_checkpoint(self):
                self._save_checkpoint(self.model, trial=None)
            figures = {k: v for method in self.safety_methods for k, v in method.diagnostics(self.model).items()}
        if figures:
            self.log(figures)
        return output

    def _check_attached(self) -> None:
        """Refuse to train what the methods do not protect."""
        if not self.safety_methods:
            return
        for method in self.safety_methods:
            if method.attached_to is not self._attached:
                raise ValueError(
                    f"{method.name} was given to another trainer after this one, whose model it protects now. Make a "
                    f"new `{type(method).__name__}(...)` for each trainer, and build this one again."
                )
        now, then = trained_modules(self.model), self._attached
        if changed := [name for name in now | then if now.get(name) is not then.get(name)]:
            raise ValueError(
                f"Other weights are trained than when the safety methods were attached: {len(changed)} differ, such "
                f"as `{changed[0]}`. Load, freeze, exchange and activate layers and adapters first, and then build "
                "the trainer."
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the run resumes after its last step: transformers would take one step too many."""
        if self.stops_gracefully and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_before_sharding(self, checkpoint: Any) -> bool:
        """With FSDP, load the adapter to resume from before weights are sharded; return whether that was done."""
        # Once they are, accelerate looks for names that a parameter which is trained through a rule does not have.
        is_split = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if not (self.safety_methods and self.is_fsdp_enabled and isinstance(self.model, PeftModel)) or is_split:
            return False
        if not isinstance(checkpoint, str) or not os.path.isfile(os.path.join(checkpoint, SAFETENSORS_WEIGHTS_NAME)):
            return False
        weights = load_peft_weights(checkpoint, device="cpu")
        set_peft_model_state_dict(self.model, weights, adapter_name=self.model.active_adapters[0])
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load as [`~trl.SFTTrainer`] does, unless it has been done; TRL has no public place for it."""
        if getattr(self, "_is_loaded", False):
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise ValueError(damaged(resume_from_checkpoint, error)) from error

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return TRL's loss, plus the methods' penalties while training."""
        if not (self.safety_methods and self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result = super().compute_loss(self._weighted(model), inputs, return_outputs, num_items_in_batch)
        self._attendance.called.add("compute_loss")
        loss, outputs = result if return_outputs else (result, None)
        penalties = [p for method in self.safety_methods if (p := method.penalty(self.model)) is not None]
        if penalties:
            penalty = torch.stack([penalty.to(loss.device) for penalty in penalties]).sum()
            self._log_penalty(penalty)
            # As TRL does with the auxiliary loss of mixtures of experts: with `num_items_in_batch` the loss itself
            # carries the accumulation, without it `training_step` divides the whole by the number of micro-batches.
            # Every process adds the same penalty and gradients are averaged over processes, so it counts once.
            steps = 1 if num_items_in_batch is None else getattr(self, "current_gradient_accumulation_steps", 1)
            loss = loss + penalty / steps
        return (loss, outputs) if return_outputs else loss

    def _weighted(self, model: Any) -> Callable[..., Any]:
        """Return the model, with each token's log-probability multiplied by its weight where methods give any."""
        methods = self._overriding("token_weights")
        if not methods:
            return model

        def forward(**inputs: Any) -> Any:
            outputs = model(**inputs)
            if "labels" not in inputs:  # TRL asks for logits, not for the loss
                return outputs
            log_probs = outputs.log_probs.detach()
            for method in methods:
                if (weights := method.token_weights(self.model, inputs, log_probs)) is not None:
                    outputs.log_probs = outputs.log_probs * weights.detach().to(log_probs.device)
            return outputs

        return forward

    def _check_token_weights(self) -> None:
        """Refuse losses that are not the sum of the tokens' log-probabilities."""
        special = self.compute_loss_func is not None or self.label_smoother is not None
        for method in self._overriding("token_weights"):
            if special or self.args.loss_type != "nll":
                raise ValueError(
                    f"{method.name} weights tokens, which needs TRL's own loss. Remove `compute_loss_func` "
                    f'and `label_smoothing_factor`, and use `loss_type="nll"` (it is {self.args.loss_type!r}).'
                )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step as [`~trl.SFTTrainer`] does; after its last backward pass, methods see the gradients."""
        with ExitStack() as stack:
            for method in self.safety_methods:
                stack.enter_context(method.training_step(self.model))
            loss = super().training_step(*args, **kwargs)
        self._attendance.called.add("training_step")
        methods = self._overriding("after_backward")
        if methods and self.accelerator.sync_gradients:
            # float16 gradients are scaled, by a power of two, and are unscaled only when they are clipped.
            scale = scaler.get_scale() if (scaler := self.accelerator.scaler) is not None else 1.0
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not gradients:  # so with layer-wise GaLore or LOMO
                raise ValueError(
                    f"{methods[0].name} found no gradient after the backward pass, so it would protect nothing. Use "
                    f"an `optim` that does not step within that pass (it is {self.args.optim!r})."
                )
            if scale == 1.0:
                gradients = []
            for gradient in gradients:
                gradient.div_(scale)
            for method in methods:
                method.after_backward(self.model)
            for gradient in gradients:
                gradient.mul_(scale)
        return loss

    def _overriding(self, moment: str) -> list[SafetyMethod]:
        return [method for method in self.safety_methods if overrides(method, moment)]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Semi-private, and TRL overrides it as well: there is no public moment before a checkpoint is written.
        if not self.safety_methods:
            super()._save_checkpoint(model, trial)
            return
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with saving(folder, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _log_penalty(self, penalty: Tensor) -> None:
        value = penalty.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The safety penalty became {value} at step {self.state.global_step}: training has diverged. "
                f"Checkpoints in `{self.args.output_dir}` are intact, but resume with the same settings. "
                "Start a new run, from the base model or from a checkpoint's weights, with a lower `learning_rate`."
            )
        self._metrics["train"]["safety_penalty"].append(value)


def machine_defaults() -> dict[str, bool]:
    """Return what TRL's default arguments need on this machine: without an accelerator they are refused."""
    if is_torch_bf16_gpu_available():
        return {}
    return {"bf16": False, "use_cpu": not torch.accelerator.is_available()}


def _default_arguments(model: Any, changed: dict[str, bool]) -> SFTConfig:
    folder = str(model if isinstance(model, str) else model.config._name_or_path).rpartition("/")[2]
    logger.warning(
        "No GPU with bfloat16, which TRL's default arguments need, was found: training on the %s in float32.",
        "CPU" if changed["use_cpu"] else "accelerator",
    )
    return SFTConfig(f"{folder}-SFT", **changed)


def _refuse_adapters(model: Any, source: Mapping[str, Any] | None = None) -> None:
    """Refuse to continue training security vectors, whose result would comply with harmful requests, or an adapter.

    `source` is how a model on the Hub is loaded, where it gets an adapter on top.
    """
    is_folder = isinstance(model, str) and os.path.isdir(model)
    folder = model if is_folder else None
    if isinstance(model, str) and not is_folder and source is not None:
        # Of an adapter on the Hub that gets another on top, PEFT forgets the settings, and with them the mark.
        with suppress(OSError, ValueError):  # of a name that is none, which TRL reports
            where = {key: source[key] for key in ("cache_dir", "revision", "token", "subfolder") if key in source}
            folder = os.path.dirname(find_adapter_config_file(model, **where) or "")
    if harmful_mark(folder) if folder else vectors_in(model):
        raise ValueError(
            f"`model`{f' ({model!r})' if folder else ''} is security vectors, harmful by construction: trained "
            "on, it would answer harmful requests. Give their base model, and the vectors as "
            "`safety=SecurityVectors(...)`."
        )
    if folder:
        refuse_adapter(folder, "" if is_folder else f"`{model}`")


def _joins(args: SFTConfig, packing: bool) -> bool:
    """Return whether rows are packed without their borders, so that none can be told from the next."""
    return packing and args.packing_strategy != "bfd"


def _learned(row: Mapping[str, Any]) -> int:
    """Return how many of the rows that are packed into one, in numpy's format, have a token to learn."""
    ends = np.cumsum(row.get("seq_lengths", [len(row["labels"])]))
    return sum(bool((labels != -100).any()) for labels in np.split(row["labels"], ends[:-1]))


def _report_left(name: str, total: int, left: int, max_length: int | None, is_stream: bool, masked: bool) -> None:
    """Warn of the rows of which nothing is learned, or refuse a dataset of which that is so for all."""
    argument = {"train": "train_dataset", "eval": "eval_dataset"}.get(name, f"eval_dataset[{name!r}]")
    if max_length is None:
        cause = "their `labels` are all -100. Check the mask that they were made with."
    elif masked:
        cause = (
            f"their `labels` are all -100 within `max_length={max_length}` tokens. Check the mask that they were made "
            "with, or raise `max_length`."
        )
    else:
        cause = (
            f"their answers start past `max_length={max_length}` tokens. Raise `max_length`, or shorten the prompts."
        )
    if not (left or is_stream):
        at_all = "teaches anything" if name == "train" else "has anything to take a loss on"
        raise ValueError(f"None of the {total:,} rows of `{argument}` {at_all}: {cause}")
    if left < total:
        logger.warning(
            "%d of %d rows of `%s`%s %s: %s",
            *(total - left, total, argument, " looked at" if is_stream else ""),
            *("teach nothing" if name == "train" else "have nothing to take a loss on", cause),
        )


def _first_rows(stream: IterableDataset) -> Dataset:
    first = list(stream.take(_LOOKED_AT))
    names = dict.fromkeys(name for row in first for name in row)  # `from_list` takes those of the first row alone
    return Dataset.from_list([names | row for row in first], on_mixed_types="use_json")


def _log_report(report: dict[str, dict[str, Any]]) -> None:
    for name, found in report.items():
        logger.info(describe_report(name, found))
        for warning in found["warnings"]:
            logger.warning("%s: %s", name, warning)


def _as_methods(safety: Any) -> list[SafetyMethod]:
    methods = [] if safety is None else list(safety) if isinstance(safety, (list, tuple)) else [safety]
    for method in methods:
        if isinstance(method, type):
            raise TypeError(f"`safety` takes methods, not classes: write `{method.__name__}(...)` with its settings.")
        if not isinstance(method, SafetyMethod):
            raise TypeError(
                f"`safety` takes a method, a list of them, {RECOMMENDED!r} or None, got {type(method).__name__} "
                f"({method!r}). Example: `safety=AsFT(unaligned_model=...)`."
            )
    name, count = Counter(type(method).__name__ for method in methods).most_common(1)[0] if methods else ("", 0)
    if count > 1:
        raise ValueError(f"`safety` holds {name} {count} times. Give each method once.")
    return methods


def _card_paper(methods: Sequence[SafetyMethod]) -> dict[str, str]:
    papers = [method.paper for method in methods if method.paper is not None]
    if not papers:
        return {}
    citation = "\n\n".join(paper.citation for paper in papers)  # TRL's card has room for one title, but all citations
    return {"title": papers[0].title, "id": papers[0].arxiv, "citation": citation}
