"""Short training runs on tiny models, and all that is left of them, so that runs can be compared to the last bit."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from safe_trainer import METHODS
from safe_trainer.data import conversation
from safe_trainer.methods.base import Materials, SafetyMethod

# A training run collects garbage several times, and each time Python walks through all that torch and transformers
# have imported: three quarters of a tiny run. What exists by now stays anyway, so it need not be looked at again.
gc.collect()
gc.freeze()

TIMINGS = ("runtime", "per_second", "preparation_time")  # how the names of what the clock says end


def settings(folder: object, **given: Any) -> SFTConfig:
    """Return TRL's settings for three logged steps on the CPU; everything else is TRL's default, bf16 included."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    short = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return SFTConfig(str(folder), **(quiet | short | given))


def exact_settings(folder: object, **given: Any) -> SFTConfig:
    """Return settings under which a step is `w - lr * gradient` in float32, over the rows in their order."""
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False}
    return settings(folder, **(plain | {"train_sampling_strategy": "sequential", "learning_rate": 0.1} | given))


def lora(**given: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": "all-linear"} | given))


def even_rows(count: int, length: int = 12) -> Dataset:
    """Return tokenized rows of one length, so that a mean over tokens is a mean over rows."""
    ids = torch.randint(4, tiny.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def given(folder: object, **changes: Any) -> dict[str, Any]:
    """Return a trainer's arguments: a tiny model, its tokenizer, conversational rows; and what is to be different.

    A change named like one of `SFTConfig`'s fields goes there, every other one to the trainer.
    """
    config = {name: value for name, value in changes.items() if name in SFTConfig.__dataclass_fields__}
    usual = {"model": tiny.model(), "train_dataset": tiny.rows(), "processing_class": tiny.tokenizer()}
    others = {name: value for name, value in changes.items() if name not in config}
    return usual | {"args": settings(folder, **config)} | others


HARMFUL = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(8)]
SHORT = {"rank": 2, "max_steps": 3, "learning_rate": 0.05}
# What the methods' cards set that does not fit a tiny model, or does nothing in a run of a few steps.
SMALL: dict[str, dict[str, Any]] = {
    "asft": {"weight": 0.5},
    "salora": {"rank": 4, "task_rank": 4},
    "security_vectors": {"fitting": SHORT},
    "refusal_anchor": {"answer_tokens": 3},
    "safe_grad": {"answer_tokens": 3},
}


def method_of(name: str, aligned: str, unaligned: str, **changes: Any) -> SafetyMethod:
    """Return the method that a card builds, for a tiny model.

    Args:
        name (`str`): Its name in `METHODS`.
        aligned (`str`): Path of the aligned model.
        unaligned (`str`): Path of the same before its alignment.
        **changes (`Any`): Settings that are to be different.
    """
    asked = [row["prompt"][-1]["content"] for row in HARMFUL]
    materials = Materials(HARMFUL, REFUSED, unaligned, aligned, asked, ["Say it nicely."])
    method = METHODS[name].card.example(materials)
    return type(method)(**{**method.settings(), **SMALL.get(name, {}), **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def history(trainer: SFTTrainer) -> list[dict[str, float]]:
    """Return the log of a run without what the clock says."""
    return [{k: v for k, v in entry.items() if not k.endswith(TIMINGS)} for entry in trainer.state.log_history]


@dataclass
class Outcome:
    """What a run leaves."""

    trainer: SFTTrainer = field(repr=False)
    start: dict[str, Tensor] = field(repr=False)
    end: dict[str, Tensor] = field(repr=False)

    @property
    def moved(self) -> set[str]:
        """Names of the weights that training changed."""
        return {name for name, tensor in self.end.items() if not same_bits(tensor, self.start[name])}


def run(build: Callable[..., SFTTrainer], arguments: dict[str, Any], **train: Any) -> Outcome:
    """Build a trainer, train, and return what is left."""
    trainer = build(**arguments)
    start = weights(trainer.model)
    trainer.train(**train)
    return Outcome(trainer, start, weights(trainer.model))


def assert_same_run(ours: Outcome, theirs: Outcome) -> None:
    """Assert that two runs had the same rows, the same log and the same weights before and after, to the last bit."""
    assert list(ours.trainer.train_dataset) == list(theirs.trainer.train_dataset)
    assert repr(history(ours.trainer)) == repr(history(theirs.trainer))  # `repr`, since NaN equals NaN here
    assert_same_weights(ours.start, theirs.start)
    assert_same_weights(ours.end, theirs.end)
    assert theirs.moved, "nothing was trained, so nothing was compared"


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not same_bits(ours[name], theirs[name])]
    assert not different


def assert_close(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Assert that two runs went the same way, measured by how far they went."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        way = (theirs[name] - start[name]).norm().item()
        assert (ours[name] - theirs[name]).norm().item() <= tolerance * way + 1e-7, name


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


class StopAt(TrainerCallback):
    """Raise the given exception when a step begins, as a full disk or a user's Ctrl-C would."""

    def __init__(self, step: int, exception: BaseException) -> None:
        self.step, self.exception = step, exception

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.exception


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """Give a folder to a run and remove it afterwards, so that the next run writes under the same name."""
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def refusal(build: Callable[[], Any]) -> BaseException:
    """Return the exception that is raised."""
    with pytest.raises(Exception) as raised:
        build()
    return raised.value
