"""Checkpoints: which one is complete, what is in it, and what happens when one cannot be saved or read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from runs import given, lora
from safetensors.torch import save_file
from trl import SFTTrainer

from safe_trainer import AsFT, SafeSFTTrainer
from safe_trainer.checkpoints import (
    RunFingerprint,
    checkpoints_of,
    is_complete,
    last_checkpoint,
    resolve_checkpoint,
    saving,
)


def method() -> AsFT:
    return AsFT(projector="none", weight=0.5)


def checkpoint(output: Path, step: int, state: str = '{"global_step": 1}') -> Path:
    """Make a folder that looks like a checkpoint; without a state, like one that was cut short."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(8, 8)}, folder / "adapter_model.safetensors")
    if state:
        (folder / "trainer_state.json").write_text(state)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Train two steps and save after each: an adapter and a full model with a method, an adapter with TRL."""
    folder = tmp_path_factory.mktemp("runs")
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    SafeSFTTrainer(**given(folder / "ours", peft_config=lora(), **config), safety=method()).train()
    SafeSFTTrainer(**given(folder / "ours, full", peft_config=None, **config), safety=method()).train()
    SFTTrainer(**given(folder / "TRL's", peft_config=lora(), **config)).train()
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(runs, tmp_path):
    """Return a function that copies a run."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs[name], tmp_path / name))

    return copy


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- which one is taken


@pytest.mark.parametrize("state", ["", '{"global_step": 1', "[]", "{}", "[" * 100_000])
def test_the_last_complete_checkpoint_is_taken_and_the_others_are_named(state, tmp_path, caplog):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 12, state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "`checkpoint-12` was interrupted" in caplog.text and "resuming from checkpoint-10" in caplog.text


def test_an_interrupted_checkpoint_is_refused_where_it_is_asked_for(tmp_path):
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora()), safety=method())
    half = checkpoint(tmp_path, 4, "")
    with pytest.raises(ValueError, match="no complete checkpoint: saving `checkpoint-4` was interrupted"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is missing or damaged.* Start the run again without resuming"):
        trainer.train(resume_from_checkpoint=str(half))
    checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="missing or damaged.* Resume from `.*checkpoint-2`"):
        trainer.train(resume_from_checkpoint=str(half))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "ours, full", "TRL's"])
@pytest.mark.parametrize("damage", [Path.unlink, halve], ids=["missing", "cut short"])
def test_a_checkpoint_without_its_last_file_is_passed_over(name, damage, copied):
    run = copied(name)
    assert [is_complete(path) for path in checkpoints_of(run)] == [True, True]
    damage(run / "checkpoint-2" / "trainer_state.json")
    assert last_checkpoint(run) == str(run / "checkpoint-1")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_weights_are_explained_before_anything_is_trained(file, copied):
    run = copied("ours")
    halve(run / "checkpoint-2" / file)
    trainer = SafeSFTTrainer(**given(run, peft_config=lora(), max_steps=2), safety=method())
    with pytest.raises(ValueError, match="checkpoint-2` is damaged .* resume from an earlier one"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_damaged_weights_of_a_full_model_are_explained(copied):
    run = copied("ours, full")
    halve(run / "checkpoint-2" / "model.safetensors")
    trainer = SafeSFTTrainer(**given(run, peft_config=None, max_steps=2), safety=method())
    with pytest.raises(ValueError, match="checkpoint-2` is damaged"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


# ---- how one is written


def test_a_checkpoint_has_the_files_of_trl_and_the_fingerprint_in_its_state(runs):
    names = {run: {path.name for path in (runs[run] / "checkpoint-2").iterdir()} for run in ("ours", "TRL's")}
    assert names["ours"] == names["TRL's"]
    state = json.loads((runs["ours"] / "checkpoint-2" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["RunFingerprint"]["attributes"]
    assert kept["AsFT"]["weight"] == 0.5 and kept["launch"] == {"processes": 1, "strategy": "one process"}


def test_a_checkpoint_that_is_written_over_is_incomplete_until_the_end(tmp_path):
    old = checkpoint(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt), saving(old, is_first_process=True):
        assert not is_complete(old)
        raise KeyboardInterrupt
    assert not is_complete(old) and (old / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("inline_container: 1")])
def test_a_checkpoint_that_finds_no_room_is_removed_and_earlier_ones_stay(error, tmp_path):
    first = checkpoint(tmp_path, 2)
    with pytest.raises(OSError, match="checkpoint-4` could not be saved .* Earlier checkpoints are intact"):
        with saving(tmp_path / "checkpoint-4", is_first_process=True):
            checkpoint(tmp_path, 4, "")
            raise error
    assert checkpoints_of(tmp_path) == [first]


def test_what_fails_after_a_complete_checkpoint_leaves_it(tmp_path):
    with pytest.raises(OSError, match="^.Errno 13. an older one$"):
        with saving(tmp_path / "checkpoint-4", is_first_process=True):
            checkpoint(tmp_path, 4)
            raise PermissionError(13, "an older one")
    assert is_complete(tmp_path / "checkpoint-4")


def test_other_failures_while_saving_keep_their_own_words(tmp_path):
    with pytest.raises(RuntimeError, match="^a bug$"), saving(tmp_path / "checkpoint-1", True):
        raise RuntimeError("a bug")


def test_without_checkpoints_the_choice_is_left_to_transformers(tmp_path):
    for fingerprint in (RunFingerprint(), RunFingerprint([method()])):
        assert resolve_checkpoint(None, tmp_path, fingerprint, tiny.model()) is None
        assert resolve_checkpoint(True, tmp_path, fingerprint, tiny.model()) is True
