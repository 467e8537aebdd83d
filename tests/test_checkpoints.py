"""Checkpoints: which one is whole, by the checksums that are saved with it, and without them by its form."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from runs import given, lora
from safetensors.torch import save_file
from trl import SFTTrainer

from safe_trainer import SafeSFTTrainer, integrity
from safe_trainer.checkpoints import Record, fault, is_whole, last_checkpoint, saving
from safe_trainer.integrity import CHECKSUMS, write_checksums
from safe_trainer.resuming import checkpoint_to_resume

NOTHING = Record([])


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
    """Train two steps and save behind each: an adapter and a whole model with us, an adapter with TRL."""
    folder = tmp_path_factory.mktemp("runs")
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for name, build, peft_config in (
        ("ours", SafeSFTTrainer, lora()),
        ("ours, full", SafeSFTTrainer, None),
        ("TRL's", SFTTrainer, lora()),
    ):
        build(**given(folder / name, peft_config=peft_config, **config)).train()
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(runs, tmp_path):
    """Return a function that copies a run, with its checksums or without them."""

    def copy(name: str, with_checksums: bool = True) -> Path:
        shutil.copytree(runs[name], tmp_path / name)
        for file in (tmp_path / name).rglob(CHECKSUMS) if not with_checksums else ():
            file.unlink()
        return tmp_path / name

    return copy


def flip(path: Path, position: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- which one is taken


@pytest.mark.parametrize("state", ["", '{"global_step": 1', "[]", "{}"])
def test_the_last_whole_checkpoint_is_taken_and_the_others_are_named(state, tmp_path, caplog):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 12, state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "`checkpoint-12` was cut short" in caplog.text and "going on from checkpoint-10" in caplog.text


def test_a_checkpoint_cut_short_is_refused_where_it_is_asked_for(tmp_path):
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora()))
    half = checkpoint(tmp_path, 4, "")
    with pytest.raises(ValueError, match="holds no whole checkpoint: `checkpoint-4` was cut short"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is missing or damaged. Start the run anew, and remove this one"):
        trainer.train(resume_from_checkpoint=str(half))
    checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="missing or damaged. Go on from `.*checkpoint-2`"):
        trainer.train(resume_from_checkpoint=str(half))


@pytest.mark.parametrize("with_checksums", [True, False], ids=["checksums", "form"])
@pytest.mark.parametrize("damage", [Path.unlink, halve], ids=["missing", "cut short"])
@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_without_all_of_its_state_is_refused_and_the_one_before_is_taken(
    file, damage, with_checksums, copied, tmp_path
):
    run = copied("ours", with_checksums)
    first, second = run / "checkpoint-1", run / "checkpoint-2"
    assert is_whole(first) and is_whole(second)
    damage(second / file)
    assert not is_whole(second)
    assert last_checkpoint(run) == str(first)
    with pytest.raises(ValueError, match=f"its `{file}` is missing or damaged. Go on from `.*checkpoint-1`"):
        checkpoint_to_resume(str(second), run, NOTHING)


@pytest.mark.parametrize("run", ["ours", "ours, full"])
def test_a_flipped_bit_in_any_file_is_told_by_the_checksums(run, copied):
    folder = copied(run) / "checkpoint-2"
    files = json.loads((folder / CHECKSUMS).read_text())["files"]
    weights = "model.safetensors" if run == "ours, full" else "adapter_model.safetensors"
    assert {weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files.keys()
    for name in files:
        flip(folder / name)
        assert fault(folder) == name
        flip(folder / name)
    assert is_whole(folder)


def test_what_is_written_for_readers_may_be_changed_and_files_may_be_added(copied):
    folder = copied("ours") / "checkpoint-2"
    (folder / "README.md").write_text("My own words.")
    (folder / "comparison.json").write_text("{}")
    assert is_whole(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"size": "1"}}}', "[" * 100_000]
)
def test_damaged_checksums_are_named(content, copied):
    folder = copied("ours") / "checkpoint-2"
    (folder / CHECKSUMS).write_text(content)
    assert fault(folder) == CHECKSUMS


def test_damaged_weights_are_told_before_anything_is_loaded(copied):
    run = copied("ours")
    halve(run / "checkpoint-2" / "adapter_model.safetensors")
    trainer = SafeSFTTrainer(**given(run, peft_config=lora(), max_steps=2))
    with pytest.raises(ValueError, match="its `adapter_model.safetensors` is missing or damaged"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


# ---- without checksums


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_of_trl_is_judged_by_its_form(file, copied):
    folder = copied("TRL's") / "checkpoint-2"
    assert not (folder / CHECKSUMS).exists() and is_whole(folder)
    halve(folder / file)
    assert fault(folder) == file


def test_every_part_of_a_model_in_parts_must_be_there(copied):
    folder = copied("ours, full", with_checksums=False) / "checkpoint-2"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"head": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "head": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    assert is_whole(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert fault(folder) == "model-00002-of-00002.safetensors"
    index.write_text("{")
    assert fault(folder) == index.name


def test_the_random_states_of_all_processes_must_be_there(copied):
    folder = copied("TRL's") / "checkpoint-2"
    for rank in range(3):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    assert is_whole(folder)
    (folder / "rng_state_1.pth").unlink()
    assert fault(folder) == "rng_state_1.pth"


def test_a_folder_of_deepspeed_stands_for_the_optimizer_only_if_it_holds_one(copied):
    folder = copied("TRL's") / "checkpoint-2"
    kept = folder / "global_step2"
    kept.mkdir()
    (folder / "optimizer.pt").rename(kept / "optimizer.pt")
    assert fault(folder) == "latest"
    (folder / "latest").write_text("global_step2")
    assert fault(folder) == "global_step2"
    (kept / "optimizer.pt").rename(kept / "mp_rank_00_model_states.pt")
    assert is_whole(folder)
    halve(kept / "mp_rank_00_model_states.pt")
    assert fault(folder) == "global_step2/mp_rank_00_model_states.pt"


# ---- how one is written


def test_a_checkpoint_that_is_written_over_is_not_whole_until_the_end(tmp_path):
    old = checkpoint(tmp_path, 2)
    write_checksums(old)
    with pytest.raises(KeyboardInterrupt), saving(old, NOTHING, is_first_process=True):
        assert not is_whole(old) and not (old / CHECKSUMS).exists()
        raise KeyboardInterrupt
    assert not is_whole(old) and (old / "adapter_model.safetensors").exists()


def test_checksums_that_cannot_be_written_leave_the_checkpoint_as_it_is(tmp_path, caplog):
    """The ones before it may have been removed by then."""
    caplog.set_level(logging.WARNING)
    with saving(tmp_path / "checkpoint-2", NOTHING, is_first_process=True):
        folder = checkpoint(tmp_path, 2)
        (folder / CHECKSUMS).mkdir()
    assert "checksums of `checkpoint-2` could not be written" in caplog.text
    (folder / CHECKSUMS).rmdir()
    assert is_whole(folder) and not list(folder.glob(".*"))


def test_checksums_tell_size_and_hash_of_every_file_below_the_folder(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "other").mkdir()
    (folder / "other" / "adapter_config.json").write_text("{}")
    write_checksums(folder)
    files = json.loads((folder / CHECKSUMS).read_text())["files"]
    assert files.keys() == {"adapter_model.safetensors", "other/adapter_config.json", "trainer_state.json"}
    assert files["other/adapter_config.json"] == {"size": 2, "xxh3": "dc7048f8f8747f561349cde127705c16"}


def test_only_who_reads_contents_pays_for_it(tmp_path):
    folder = checkpoint(tmp_path, 2)
    write_checksums(folder)
    flip(folder / "adapter_model.safetensors")
    assert fault(folder, by_content=False) is None and fault(folder) == "adapter_model.safetensors"
    halve(folder / "adapter_model.safetensors")
    assert fault(folder, by_content=False) == "adapter_model.safetensors"


def test_a_resume_reads_each_file_of_one_checkpoint_once(copied, monkeypatch):
    run, read, hashed = copied("ours"), [], integrity._hash
    monkeypatch.setattr(integrity, "_hash", lambda path: read.append(path) or hashed(path))
    assert checkpoint_to_resume(True, run, NOTHING) == str(run / "checkpoint-2")
    assert {path.parent.name for path in read} == {"checkpoint-2"} and len(read) == len(set(read)) > 5


def test_other_failures_while_saving_keep_their_own_words(tmp_path):
    with pytest.raises(RuntimeError, match="^a bug$"), saving(tmp_path / "checkpoint-1", NOTHING, True):
        raise RuntimeError("a bug")


def test_a_model_in_memory_without_checkpoints_is_not_asked_for_any(tmp_path):
    assert checkpoint_to_resume(None, tmp_path, NOTHING) is None
    assert checkpoint_to_resume(True, tmp_path, NOTHING, tiny.model()) is True
