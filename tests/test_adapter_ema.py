"""The moving average of an adapter against one written out by hand: at the end, resumed, and for stock PEFT.

`python test_adapter_ema.py FOLDER` is one of two processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from peft import PeftModel
from processes import on_two_processes
from runs import assert_close, assert_same_weights, exact_settings, given, history, lora, method_of, run, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from safe_trainer import AdapterEMA, SafeSFTTrainer

DECAY = 0.8


class ByHand(TrainerCallback):
    """Averages the weights as the formula says, in float64, and notes what they were before the last moment."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = {name: weight.detach().double() for name, weight in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.raw = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for name, weight in self.raw.items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * weight.double()


def arguments(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> dict[str, Any]:
    schedule = {"lr_scheduler_type": "constant", "bf16": False, "max_steps": 5}
    return given(folder, peft_config=lora(), callbacks=list(callbacks), **(schedule | changes))


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("build", [SFTTrainer, SafeSFTTrainer])
def test_what_is_left_is_the_average_and_training_itself_goes_as_without_it(build, optim, tmp_path):
    by_hand = ByHand()
    ours = run(build, arguments(tmp_path, by_hand, AdapterEMA(DECAY), optim=optim))
    plain = run(build, arguments(tmp_path, optim=optim))
    expected = {name: weight.float() for name, weight in by_hand.average.items()}
    end = {name: ours.end[name] for name in expected}
    assert_close(end, expected, ours.start, tolerance=1e-5)
    assert_same_weights(by_hand.raw, {name: plain.end[name] for name in by_hand.raw})
    assert repr(history(ours.trainer)) == repr(history(plain.trainer))
    assert ours.moved == plain.moved != set()
    assert any(not torch.equal(ours.end[name], plain.end[name]) for name in ours.moved)


def test_a_step_that_float16_skips_is_none(tmp_path):
    """A scaler skips the first steps, when Adam has no state yet and would take any for its own."""
    layer, ema = torch.nn.Linear(2, 2), AdapterEMA(DECAY)
    optimizer: Any = torch.optim.AdamW(layer.parameters())
    start, args, state = layer.weight.detach().clone(), exact_settings(tmp_path), TrainerState()
    ema.on_train_begin(args, state, None, optimizer=optimizer)
    for skipped in (True, False):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step_was_skipped = skipped  # as accelerate's wrapper says
        if not skipped:
            optimizer.step()
        ema.on_optimizer_step(args, state, None, optimizer=optimizer)
    end = layer.weight.detach().clone()
    ema.on_train_end(args, state, None)
    torch.testing.assert_close(layer.weight.detach(), DECAY * start + (1 - DECAY) * end)
    assert not torch.equal(start, end)


@pytest.mark.slow
def test_accumulation_of_small_batches_is_one_large_batch(tmp_path):
    def trained(batch: int, accumulation: int) -> Any:
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return run(SFTTrainer, arguments(tmp_path, AdapterEMA(DECAY), optim="sgd", learning_rate=1.0, **size))

    large, small = trained(8, 1), trained(2, 4)
    assert_close(small.end, large.end, large.start, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "salora", "refusal_anchor"])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(name, tmp_path):
    pair = tiny.save_pair(tmp_path / "pair")

    def trained(**train: Any) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 2, "model": pair[0], "processing_class": None}

        def build(**a) -> Any:
            return SafeSFTTrainer(**a, safety=method_of(name, *pair) if name else None)

        return run(build, arguments(tmp_path / "run", AdapterEMA(DECAY), **saving), **train)

    complete = trained()
    resumed = trained(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.trainer.state.global_step == 5 and complete.moved
    assert_close(resumed.end, complete.end, complete.start, tolerance=1e-5)


@pytest.mark.slow
def test_the_saved_adapter_is_ordinary_and_checkpoints_hold_the_weights_themselves(tmp_path):
    by_hand = ByHand()
    trainer = SFTTrainer(**arguments(tmp_path, by_hand, AdapterEMA(DECAY), save_strategy="steps", save_steps=5))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder, expected in (("saved", trainer.model.state_dict()), ("checkpoint-5", by_hand.raw)):
        loaded = weights(PeftModel.from_pretrained(tiny.model(), tmp_path / folder))
        factors = [name for name in loaded if "lora_" in name]
        assert factors and all(torch.allclose(loaded[name], expected[name], atol=1e-7) for name in factors)


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_decay_or_without_an_average(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    SFTTrainer(**arguments(tmp_path / "with", AdapterEMA(DECAY), **saving)).train()
    SFTTrainer(**arguments(tmp_path / "without", **saving)).train()
    for folder, decay, message in (("with", 0.5, "`decay` .* was 0.8.* and is 0.5"), ("without", 0.8, "no average")):
        trainer = SFTTrainer(**arguments(tmp_path / folder, AdapterEMA(decay)))
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))


@pytest.mark.slow
def test_what_would_undo_the_average_is_refused(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    trainer = SFTTrainer(**arguments(tmp_path, AdapterEMA(), eval_dataset=tiny.rows(), **best))
    with pytest.raises(ValueError, match="`load_best_model_at_end`"):
        trainer.train()
    for decay in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`decay` must be .* got"):
            AdapterEMA(decay)


# ---- on two processes


def carry_out(strategy: str, folder: Path, run: str) -> None:
    """Train three steps, or the third again from a checkpoint; save what is left, or how it was refused."""
    with launch.spread(strategy, folder) as (model, extra):
        size = {"per_device_train_batch_size": 8 if strategy == "alone" else 4}
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        optimizer = {"optim": "adamw_torch", "learning_rate": 0.01}
        args = exact_settings(folder / strategy / "run", **size, **saving, **optimizer, **extra)
        torch.manual_seed(0)
        rows, average = tiny.rows(24), AdapterEMA(DECAY)
        trainer = SafeSFTTrainer(model, args=args, train_dataset=rows, peft_config=lora(), callbacks=[average])
        checkpoint = str(folder / strategy / "run" / "checkpoint-2") if run == "resumed" else None
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except ValueError as refusal:
            (folder / f"{strategy}-refused-{os.environ.get('RANK', '0')}").write_text(str(refusal))
            return
        trainer.save_model(str(folder / strategy / run))


@pytest.mark.exhaustive
def test_two_processes_end_as_one_and_resume_and_deepspeed_is_refused(tmp_path):
    tiny.save_pair(tmp_path)
    carry_out("alone", tmp_path, "complete")
    on_two_processes(__file__, str(tmp_path))
    expected = load_file(tmp_path / "alone" / "complete" / "adapter_model.safetensors")
    for strategy in ("ddp", "fsdp2"):
        for which in ("complete", "resumed"):
            found = load_file(tmp_path / strategy / which / "adapter_model.safetensors")
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{strategy} {which} {name}")
    for rank in range(2):
        assert "does not work with DeepSpeed" in (tmp_path / f"zero2-refused-{rank}").read_text()


def main(folder: Path) -> None:
    for strategy in ("ddp", "fsdp2"):
        for which in ("complete", "resumed"):
            carry_out(strategy, folder, which)
    carry_out("zero2", folder, "complete")
    launch.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
