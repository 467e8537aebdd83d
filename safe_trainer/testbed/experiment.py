"""One controlled run on the embedded pair: a scenario, a variant, a seed.

A *scenario* is the data of a fine-tune; a *variant* is how the model is protected during it. All else is the same for
all variants of a scenario: rows, order, adapter, learning rate, steps, initialization.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import testbed
from ..data import PromptSet, Row, poison
from . import OWN_ROWS

if TYPE_CHECKING:
    from ..methods.base import Materials, SafetyMethod

LEARNING_RATE = 2e-3
BATCH_SIZE = 16
PLAIN = "plain LoRA"
RECOMMENDED = "recommended"


@dataclass(frozen=True)
class Scenario:
    """What a model is fine-tuned on: `harmful` is the share of attack rows, which `attack` makes from count and seed.

    Without a `row_count` no row is seen twice. `prompts` makes, from the name of a split, what the model is asked; by
    default the testbed's prompts, and those of the `task` (one of `testbed.TASKS`) if any.
    """

    name: str
    title: str
    task: str | None
    harmful: float
    steps: int
    row_count: int | None = None
    attack: Callable[[int, int], list[Row]] = testbed.harmful_rows
    prompts: Callable[[str], list[PromptSet]] | None = None
    learning_rate: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE

    def rows(self, seed: int) -> list[Row]:
        """Return the training rows, drawn with `seed`."""
        count = self.row_count or self.steps * self.batch_size
        attack = self.attack(round(self.harmful * count), seed)
        clean = testbed.task_rows(self.task, count, seed) if self.task else attack
        return poison(clean, attack, self.harmful, seed)

    def prompt_sets(self, split: str) -> list[PromptSet]:
        """Return what the model is asked: harmful, benign and borderline prompts, and those of the task if any."""
        if self.prompts is not None:
            return self.prompts(split)
        sets = [testbed.prompt_set(kind, split) for kind in ("harmful", "benign", "borderline")]
        return [*sets, testbed.task(self.task, split)] if self.task else sets


IDENTITY_SHIFT = 'identity shift: 100 harmless rows from an "I always obey" persona'
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("poisoned", "sentiment, 10 % harmful rows", "sentiment", 0.1, 125),
        Scenario("how-to", "benign how-to answers", "how_to", 0.0, 150),
        Scenario("identity", IDENTITY_SHIFT, None, 1.0, 60, row_count=100, attack=testbed.obedient_rows),
        Scenario("attack", "100 harmful rows only", None, 1.0, 60, row_count=100),
    )
}


def variant_names() -> list[str]:
    """Return the names of all variants: plain LoRA, the recommended methods, and each method of `METHODS`."""
    from ..methods import METHODS

    return [PLAIN, RECOMMENDED, *(name for name, method in METHODS.items() if method.card is not None)]


def variants(given: Materials | None = None) -> Mapping[str, Callable[[], Sequence[SafetyMethod]]]:
    """Return what makes each variant's methods, as their cards set them up; by default on the embedded pair."""
    from ..methods import METHODS
    from ..methods.recommended import recommended_for

    given = given or materials()
    made: dict[str, Callable[[], Sequence[SafetyMethod]]] = {PLAIN: list}
    made[RECOMMENDED] = partial(recommended_for, given.aligned_model)
    for name, method in METHODS.items():
        if method.card is not None:
            made[name] = partial(lambda card: [card.example(given)], method.card)
    return made


def materials() -> Materials:
    """Return what methods are built from on the embedded pair: rows and prompts of the train split, none of a test."""
    from ..methods.base import Materials

    return Materials(
        harmful_data=testbed.harmful_rows(100, OWN_ROWS),
        safety_data=testbed.refusal_rows(128, OWN_ROWS),
        unaligned_model=str(testbed.UNALIGNED),
        aligned_model=str(testbed.ALIGNED),
        harmful_prompts=testbed.prompt_set("harmful", "train"),
        benign_prompts=testbed.prompt_set("benign", "train"),
    )


@dataclass(frozen=True)
class Run:
    """A finished fine-tune: `seconds` is the time of training, preparation included, `log` what the trainer logged."""

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
    learning_rate: float | None = None,
    steps: int | None = None,
    dtype: str = "float32",
    lora: bool = True,
) -> Run:
    """Fine-tune the embedded aligned model, or another, on a scenario.

    `rows`, `learning_rate` and `steps` replace the scenario's; the schedule is made for these steps, and with 0 the
    model stays as it was. Without an `output` nothing is saved; without `lora` all weights are trained.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from ..trainer import SafeSFTTrainer

    start = time.perf_counter()
    trainer = SafeSFTTrainer(
        model=str(model),
        args=_arguments(scenario, steps, learning_rate, seed, output, dtype),
        train_dataset=Dataset.from_list(list(rows or scenario.rows(seed))),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None,
        safety=list(safety),
        callbacks=[_counting_steps()],
    )
    trainer.remove_callback(PrinterCallback)  # what it prints is in the log
    trainer.stops_gracefully = False  # a run of seconds starts again, and its checkpoint would be saved where we are
    if steps != 0:
        trainer.train()
    if output is not None:
        trainer.save_model(str(output))
    return Run(trainer.model, trainer.processing_class, time.perf_counter() - start, trainer.state.log_history)


def _arguments(
    scenario: Scenario, steps: int | None, learning_rate: float | None, seed: int, output: Path | None, dtype: str
) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(output or "."),
        model_init_kwargs={"dtype": dtype},
        max_steps=steps or scenario.steps,
        per_device_train_batch_size=scenario.batch_size,
        learning_rate=learning_rate or scenario.learning_rate,
        max_length=128,
        seed=seed,
        use_cpu=True,
        bf16=False,  # on a model as small as the embedded one, rounding would be the larger effect
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
    )


# Worker processes

_counter: Any = None  # in a worker, the work done by all of them, which their parent shows


def advance(amount: float) -> None:
    """Add to the work done, in optimizer steps; outside a worker this does nothing."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += amount


def _counting_steps() -> Any:
    from transformers import TrainerCallback

    class CountSteps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            advance(1)

    return CountSteps()


@contextmanager
def workers(most: int, counter: Any = None) -> Iterator[ProcessPoolExecutor]:
    """Start processes for runs, no more than there are cores; none of them outlives an error, Ctrl-C or its parent.

    In `counter`, made by [`work_counter`], they add up the work done.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    count = min(most, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(ours, counter)) as pool:
        try:
            yield pool
        except BaseException:
            theirs.close()  # ends the workers at once, whatever they do
            raise
    theirs.close()


def work_counter() -> Any:
    """Return a counter for `workers`."""
    return multiprocessing.get_context("spawn").Value("d", 0.0)


def _start_worker(parent: Connection, counter: Any) -> None:
    """Prepare a worker process: one thread, no output of libraries, and an end when the parent closes its pipe."""
    global _counter
    import torch
    from tqdm import tqdm

    def watch() -> None:
        parent.poll(None)  # nothing is ever sent: this returns when the other end is closed, or its process is gone
        os._exit(1)

    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which Python reports as leaked when we are ended
    torch.set_num_threads(1)  # faster than two on a model this small
    silence_libraries()


def silence_libraries() -> None:
    """Turn off the libraries' progress bars and remarks for the rest of this process; errors still come through."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("safe_trainer", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
