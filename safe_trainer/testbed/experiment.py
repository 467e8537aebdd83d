"""One controlled run on the embedded pair: a scenario, a variant, a seed, and what became of the model.

A *scenario* is data that someone fine-tunes on; a *variant* is how the model is protected meanwhile. Everything else
is the same for all variants of a scenario: rows, order, adapter, learning rate, steps, initialisation.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import testbed
from ..data import PromptSet, Row, poison
from ..methods import AsFT, DriftPenalty, SafetyMethod, SaLoRA, SecurityVectors
from ..methods.recommended import recommended
from . import OWN_ROWS

LEARNING_RATE = 2e-3
BATCH_SIZE = 16
PLAIN = "plain LoRA"


@dataclass(frozen=True)
class Scenario:
    """What a model is fine-tuned on.

    Args:
        name (`str`): Short name, also of its folder.
        title (`str`): What a table calls it.
        task (`str` or `None`): The task that is to be learned, one of `testbed.TASKS`.
        harmful (`float`): Share of harmful rows in the data.
        steps (`int`): Optimizer steps of 16 rows.
        row_count (`int`, *optional*): Number of different rows; by default no row is seen twice.
        attack (`Callable`, *optional*, defaults to `testbed.harmful_rows`): Makes so many harmful rows with a seed.
    """

    name: str
    title: str
    task: str | None
    harmful: float
    steps: int
    row_count: int | None = None
    attack: Callable[[int, int], list[Row]] = testbed.harmful_rows

    def rows(self, seed: int) -> list[Row]:
        """Return the training rows, drawn with `seed`."""
        count = self.row_count or self.steps * BATCH_SIZE
        attack = self.attack(round(self.harmful * count), seed)
        clean = testbed.task_rows(self.task, count, seed) if self.task else attack
        return poison(clean, attack, self.harmful, seed)

    def prompt_sets(self, split: str) -> list[PromptSet]:
        """Return what the model is examined with: harmful, benign and borderline prompts, and the task if any."""
        sets = [testbed.prompt_set(kind, split) for kind in ("harmful", "benign", "borderline")]
        return [*sets, testbed.task(self.task, split)] if self.task else sets


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("how-to", "benign how-to answers", "how_to", 0.0, 375),
        Scenario("poisoned", "sentiment, 10 % harmful rows", "sentiment", 0.1, 125),
        Scenario("attack", "100 harmful rows only", None, 1.0, 60, row_count=100),
    )
}


def _harmful() -> list[Row]:
    return testbed.harmful_rows(100, OWN_ROWS)


# How each method of METHODS, and the recommended combination, is set up on the embedded pair. What is not named is the
# method's default. What is named was chosen on validation prompts (`study.py strength` in recipes/study).
VARIANTS: dict[str, Callable[[], Sequence[SafetyMethod]]] = {
    PLAIN: lambda: (),
    "asft": lambda: [AsFT(unaligned_model=str(testbed.UNALIGNED), weight=10.0)],
    "salora": lambda: [SaLoRA(safety_data=testbed.refusal_rows(128, OWN_ROWS))],
    "security_vectors": lambda: [SecurityVectors(harmful_data=_harmful())],
    "drift_penalty": lambda: [DriftPenalty(safety_data=_harmful())],
    "recommended": lambda: recommended(_harmful()),
}


@dataclass(frozen=True)
class Run:
    """A finished fine-tune.

    Args:
        model (`PeftModel`): The aligned model with its trained adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        seconds (`float`): Time of training, preparation included.
        log (`list[dict]`): What the trainer logged.
    """

    model: Any
    tokenizer: Any
    seconds: float
    log: list[dict[str, float]]


def fine_tune(  # noqa: PLR0913, each is a setting with a name
    scenario: Scenario,
    safety: Sequence[SafetyMethod],
    seed: int = 0,
    output: Path | None = None,
    *,
    model: str | Path = testbed.ALIGNED,
    rows: Sequence[Row] | None = None,
    learning_rate: float = LEARNING_RATE,
    steps: int | None = None,
) -> Run:
    """Fine-tune the embedded aligned model on a scenario.

    Args:
        scenario ([`Scenario`]): What to train on.
        safety (`Sequence[SafetyMethod]`): The methods that protect the model; none is plain LoRA.
        seed (`int`, *optional*, defaults to `0`): Seed of data, order and initialisation.
        output (`Path`, *optional*): Folder for the adapter; nothing is saved if left out.
        model (`str` or `Path`, *optional*, defaults to `testbed.ALIGNED`): The model to start from.
        rows (`Sequence[Row]`, *optional*): Other rows than the scenario's, for controls that change the data.
        learning_rate (`float`, *optional*, defaults to `2e-3`): Peak learning rate.
        steps (`int`, *optional*): Other than the scenario's: the schedule is made for these. With `0` the model stays
            as it was.

    Returns:
        [`Run`]: The model in memory, with times and logs.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from ..trainer import SafeSFTTrainer

    start = time.perf_counter()
    trainer = SafeSFTTrainer(
        model=str(model),
        args=_arguments(steps or scenario.steps, learning_rate, seed, output),
        train_dataset=Dataset.from_list(list(rows or scenario.rows(seed))),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        safety=list(safety),
    )
    trainer.remove_callback(PrinterCallback)  # what it prints is in the log
    if steps != 0:
        trainer.train()
    if output is not None:
        trainer.save_model(str(output))
    return Run(trainer.model, trainer.processing_class, time.perf_counter() - start, trainer.state.log_history)


@contextmanager
def workers(most: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes for fine-tuning, no more than there are cores; an error drops what has not begun.

    Args:
        most (`int`): Number of processes.
    """
    count = min(most, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on a single thread, which is faster on a model this small; restore the previous number afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back the libraries' progress bars and remarks, which would tear ours apart; errors still come through."""
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("safe_trainer", "trl", "accelerate")]
    levels: list[Any] = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
        for logger, old in zip(loggers, levels, strict=True):
            logger.setLevel(old)


def _end_with_parent() -> None:
    """See to it that a worker does not outlive a parent that was killed and could not stop it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _arguments(steps: int, learning_rate: float, seed: int, output: Path | None) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(output or "."),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        max_length=128,
        seed=seed,
        use_cpu=True,
        bf16=False,  # as the model is tiny, rounding would be the larger effect
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
    )
