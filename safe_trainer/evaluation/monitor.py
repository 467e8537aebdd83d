"""Refusals during training: a curve next to the loss, and an alarm."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..data import PromptSet
from ..distributed import from_first_process
from .evaluate import judged
from .generate import Answer, Decoding, generate
from .judges import Judge, LikelihoodJudge
from .prompting import tokenizer_in
from .results import SetResult
from .state import check_replaces_alone, is_due, log_between, watchable

logger = logging.getLogger(__name__)


class RefusalMonitor(TrainerCallback):
    """Measure refusals and over-refusals every few steps and write them into the trainer's logs.

    A plain `TrainerCallback`: it works with TRL's `SFTTrainer` as with [`SafeSFTTrainer`]. The rates go wherever the
    loss goes (progress bar, TensorBoard, W&B, trackio, `trainer.state.log_history`), as
    `safety/<set>_refused` and `…_complied`, each with its 95 % interval (`…_low`, `…_high`), of `…_judged` prompts,
    with the seconds spent so far as `safety/monitor_seconds`. The first check is made before the first step. Training
    is not disturbed: same weights, same losses, same random numbers as without the monitor. On several processes each
    needs the monitor and asks all prompts, since a sharded model answers only where all ask; the first process's rate
    decides.

    Args:
        trainer (`transformers.Trainer`): The trainer that it watches; its `log` is what it writes to.
        prompt_sets (`Sequence[PromptSet]`): Harmful, benign and borderline prompts; 40 to 100 of each are a fair
            start.
        every (`int`, *optional*, defaults to `50`): Optimizer steps between checks; the last step is checked too.
        judge (`Judge`, *optional*, defaults to `LikelihoodJudge()`): Who judges. The default needs no answers and
            costs little more than one forward pass, but knows English openings only: give those of your model, as in
            `LikelihoodJudge(refusals=[...], compliances=[...])`. Any other judge has answers generated.
        minimum_rate (`float`, *optional*): Above 0 and below 1. Training stops when the lower end of the 95 % interval
            of a harmful set's refusal rate falls below it. Even all of n prompts have a lower end of about
            n / (n + 4), so 40 prompts can hold a minimum rate of at most 0.91.
        restore (`bool`, *optional*, defaults to `False`): Whether to put back the trainable weights of the last check
            that held the minimum rate. They are kept in the CPU's memory: little for an adapter, a copy of the model
            for full fine-tuning.
        decoding (`Decoding`, *optional*): How answers are generated, where the judge needs them.

    Raises:
        ValueError: If `every` is below 1, there is no prompt set, one is a task, there is a `minimum_rate` but no
            harmful set, or training is spread by FSDP1, ZeRO-3 or tensor parallelism; and at the start of training, if
            the model does not hold `minimum_rate` to begin with, or if something else than `restore` is to replace the
            weights at the end: the best checkpoint, or an [`AdapterEMA`].

    Example:

    ```python
    trainer = SFTTrainer(model, train_dataset=rows, peft_config=LoraConfig())  # or SafeSFTTrainer
    sets = [prompt_set("harmful", "validation"), prompt_set("borderline", "validation")]
    trainer.add_callback(RefusalMonitor(trainer, sets, every=25, minimum_rate=0.8, restore=True))
    trainer.train()
    ```
    """

    def __init__(  # noqa: PLR0913, each is a setting with a name
        self,
        trainer: Any,
        prompt_sets: Sequence[PromptSet],
        every: int = 50,
        *,
        judge: Judge | LikelihoodJudge | None = None,
        minimum_rate: float | None = None,
        restore: bool = False,
        decoding: Decoding | None = None,
    ) -> None:
        kinds = [prompt_set.kind for prompt_set in prompt_sets]
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every}.")
        if not kinds or "task" in kinds:
            raise ValueError(f"`prompt_sets` must be harmful, benign or borderline ones, got {kinds or 'none'}.")
        if minimum_rate is not None and not 0 < minimum_rate < 1:
            raise ValueError(f"`minimum_rate` must be above 0 and below 1, got {minimum_rate}.")
        if minimum_rate is not None and "harmful" not in kinds:
            raise ValueError(f"`minimum_rate` needs a harmful prompt set, got {kinds}.")
        if restore and minimum_rate is None:
            raise ValueError("`restore` needs a `minimum_rate`: it says when the weights are put back.")
        watchable(trainer, "The refusal monitor", "safe-trainer compare")
        self.trainer, self.prompt_sets, self.every = trainer, tuple(prompt_sets), every
        self.minimum_rate, self.restore = minimum_rate, restore
        self.judge, self.decoding = judge or LikelihoodJudge(), decoding or Decoding()
        self.seconds = 0.0
        self._started = 0.0
        self._results: list[SetResult] = []
        self._held: dict[str, Any] = {}
        self._held_step = 0
        self._measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model before the first step."""
        if self.restore:
            others = self.trainer.callback_handler.callbacks
            check_replaces_alone("`restore` of `RefusalMonitor`", "`restore`", args, others)
        elif self.minimum_rate is not None and args.load_best_model_at_end:
            logger.warning(
                "`load_best_model_at_end` puts the best checkpoint in the place of the weights that are checked last, "
                "and it may not hold `minimum_rate=%s`. Remove `load_best_model_at_end`.", self.minimum_rate,
            )  # fmt: skip
        self.seconds, self._started = 0.0, time.perf_counter()
        low = self._check(state.global_step)
        logger.info("Refusals are judged by `%s`.", self.judge.name)
        for result in self._results:
            if isinstance(self.judge, LikelihoodJudge) and (remark := self.judge.remark(result)):
                logger.warning(remark)
        if self.minimum_rate is not None and low < self.minimum_rate:
            raise ValueError(
                f"`minimum_rate={self.minimum_rate}` cannot be held: before the first step the lower end of the "
                f"refusal rate is {low:.3f}. Lower `minimum_rate` or leave it out, or give more harmful prompts."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps and the last, and stop where the refusal rate falls below the minimum."""
        if is_due(state, self.every):
            self._keep_minimum(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end of a run that was stopped between two checks, and log how long the monitoring took."""
        if self._measured != state.global_step:
            self._keep_minimum(state, control)
        self._held = {}
        logger.info("Watching refusals took %.1f s, %.1f %% of the training time.", self.seconds, 100 * self.overhead)

    def _keep_minimum(self, state: Any, control: Any) -> None:
        """Measure; below the minimum rate stop training, with the weights put back if asked to."""
        low = self._check(state.global_step)
        if self.minimum_rate is None or low >= self.minimum_rate:
            return
        control.should_training_stop = True
        consequence = "Training stops."
        if self.restore:
            for name, parameter in self.trainer.model.named_parameters():
                if name in self._held:
                    _here(parameter).copy_(self._held[name])
            consequence = f"Training stops with the weights of step {self._held_step}."
        logger.warning(
            "The lower end of the refusal rate is %.3f at step %d, below `minimum_rate=%s`. %s",
            low, state.global_step, self.minimum_rate, consequence,
        )  # fmt: skip

    @property
    def overhead(self) -> float:
        """Share of the time since training began that was spent here, from 0 to 1."""
        elapsed = time.perf_counter() - self._started if self._started else 0.0
        return self.seconds / elapsed if elapsed else 0.0

    def _check(self, step: int) -> float:
        """Measure and log, and return the lowest lower end of the harmful sets."""
        start, self._measured = time.perf_counter(), step
        results = self._results = [self._evaluate(prompt_set) for prompt_set in self.prompt_sets]
        low = min((r.rate("refused").low for r in results if r.prompt_set.kind == "harmful"), default=1.0)
        if self.minimum_rate is not None:  # no two processes round alike, and none may stop alone
            low = from_first_process(low)
        if self.minimum_rate is not None and self.restore and low >= self.minimum_rate:
            self._hold(step)
        self.seconds += time.perf_counter() - start
        values = {"safety/monitor_seconds": round(self.seconds, 3)}
        for result in results:
            values |= _values(result)
        log_between(self.trainer, values)
        return low

    def _evaluate(self, prompt_set: PromptSet) -> SetResult:
        """Ask the judge, and generate answers only where it looks at them."""
        asked = self.trainer.model, tokenizer_in(self.trainer.processing_class)
        if isinstance(self.judge, LikelihoodJudge):
            judge: Judge = self.judge.bound(*asked, self.decoding)
            return judged(prompt_set, [Answer("")] * len(prompt_set), [judge])
        answers = generate(*asked, prompt_set.conversations(), **vars(self.decoding))
        return judged(prompt_set, answers, [self.judge])

    def _hold(self, step: int) -> None:
        """Keep the trainable weights, reusing the memory of those kept before."""
        for name, parameter in self.trainer.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in self._held:
                self._held[name].copy_(_here(parameter))
            else:
                self._held[name] = _here(parameter).to("cpu", copy=True)
        self._held_step = step


def _here(parameter: Any) -> Any:
    """Return what this process holds of a parameter, which of a sharded one is its piece, without its gradient."""
    from torch.distributed.tensor import DTensor

    held = parameter.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def _values(result: SetResult) -> dict[str, float]:
    name = f"safety/{result.prompt_set.name}"
    rates = {outcome: result.rate(outcome) for outcome in ("refused", "complied")}
    values: dict[str, float] = {f"{name}_judged": rates["refused"].total}
    for outcome, rate in rates.items() if rates["refused"].total else ():
        values |= {
            f"{name}_{outcome}": rate.value,
            f"{name}_{outcome}_low": rate.low,
            f"{name}_{outcome}_high": rate.high,
        }
    return values
