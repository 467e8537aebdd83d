"""Going on from a checkpoint: with the same methods, data, adapter and processes, or told what is different."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from runs import given, lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from safe_trainer import (
    AlignmentDirection,
    AsFT,
    RefusalAnchor,
    SafeSFTTrainer,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    train_security_vectors,
)
from safe_trainer.checkpoints import LAUNCH, RunFingerprint, resolve_checkpoint
from safe_trainer.data import conversation
from safe_trainer.methods.base import SafetyMethod
from safe_trainer.methods.fingerprint import MADE_FROM, settings_of

HARMFUL = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(8)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


# ---- methods and their settings


@pytest.fixture(scope="module")
def protected_run(pair, tmp_path_factory) -> tuple[Path, Path]:
    """Train one step with AsFT and vectors from files; return the checkpoint and the file."""
    folder = tmp_path_factory.mktemp("private-place")
    file = folder / "harmful.jsonl"
    file.write_text("\n".join(map(json.dumps, HARMFUL)))
    resumable(folder / "run", pair, methods_of(file)).train()
    return folder / "run" / "checkpoint-1", file


def methods_of(file: Path, weight: float = 0.5) -> list[Any]:
    return [
        AsFT(unaligned_model=None, projector="none", weight=weight),
        SecurityVectors(harmful_data=file, fitting={"rank": 2, "max_steps": 1}),
    ]


def resumable(folder: Path, pair: tuple[str, str], methods: Any, **changes: Any) -> SafeSFTTrainer:
    config = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = given(folder, **{"model": pair[0], "peft_config": lora(), **config, **changes})
    return SafeSFTTrainer(**arguments, safety=methods)


def kept(checkpoint: Path) -> dict[str, Any]:
    """Return the fingerprint in a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["RunFingerprint"]["attributes"]


def keep(checkpoint: Path, content: Any) -> None:
    """Replace the fingerprint in a checkpoint."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["RunFingerprint"] = {"args": {}, "attributes": content}
    path.write_text(json.dumps(state))


@pytest.mark.slow
def test_the_fingerprint_in_a_checkpoint_tells_neither_data_nor_places(protected_run):
    checkpoint, file = protected_run
    text = json.dumps(kept(checkpoint))
    assert kept(checkpoint)["AsFT"]["weight"] == 0.5
    assert "private-place" not in text and "bad thing" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"), [({"lora_alpha": 7}, "`lora_alpha` was .* and is 7"), ({"r": 3}, "`r` was .* and is 3")]
)
def test_another_adapter_than_the_checkpoint_s_is_refused_with_the_difference(
    changes, told, protected_run, pair, tmp_path
):
    """Its weights would fit, and mean something else."""
    checkpoint, file = protected_run
    trainer = resumable(tmp_path, pair, methods_of(file), peft_config=lora(**changes))
    with pytest.raises(ValueError, match=f"was made with other settings of the adapter: {told}. Resume with those"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_settings_from_another_place(protected_run, pair, tmp_path):
    checkpoint, file = protected_run
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes(file.read_bytes())
    resumable(tmp_path, pair, methods_of(moved)).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file, other: methods_of(file, weight=0.7), "`weight` of AsFT was 0.5 and is 0.7"),
        (lambda file, other: methods_of(other), "`harmful_data` of SecurityVectors was .*sha256"),
        (lambda file, other: methods_of(file)[:1], "was made with SecurityVectors, this run has none"),
        (lambda file, other: None, "was made with AsFT, this run has none; .*was made with SecurityVectors"),
        (
            lambda file, other: [*methods_of(file), RefusalAnchor()],
            "the checkpoint was made without RefusalAnchor",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_methods_or_settings(change, message, protected_run, pair, tmp_path):
    checkpoint, file = protected_run
    other = tmp_path / "harmful.jsonl"
    other.write_text("\n".join(map(json.dumps, HARMFUL[:-1])))
    trainer = resumable(tmp_path, pair, change(file, other))
    with pytest.raises(ValueError, match=message) as raised:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "Resume with those of the checkpoint" in str(raised.value)


@pytest.mark.slow
def test_a_checkpoint_that_was_made_without_methods_does_not_go_on_with_one(pair, tmp_path):
    resumable(tmp_path, pair, None).train()
    method = AsFT(projector="none", weight=0.5)
    with pytest.raises(ValueError, match="was made without AsFT, by TRL or with `safety=None`"):
        resumable(tmp_path, pair, method).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("content", [3, [], {"AsFT": 3}, {"AsFT": None}], ids=str)
def test_a_damaged_fingerprint_is_named(content, protected_run, pair, tmp_path):
    damaged = tmp_path / "checkpoint-1"
    shutil.copytree(protected_run[0], damaged)
    keep(damaged, content)
    with pytest.raises(ValueError, match="checkpoint-1` is damaged"):
        resumable(tmp_path, pair, methods_of(protected_run[1])).train(resume_from_checkpoint=True)


def test_rows_bases_and_iterators_are_told_apart_by_what_is_in_them():
    def told(**given):
        return settings_of([SaLoRA(**given)])["SaLoRA"]

    assert told(safety_data=REFUSED) == told(safety_data=tuple(REFUSED))
    assert told(safety_data=REFUSED) != told(safety_data=HARMFUL)
    assert told(safety_data=iter(REFUSED))["safety_data"] == {"kind": "list_iterator"}
    one, same, other = (
        SafetyBasis({}, {}, {"rows_sha256": rows, "created": day})
        for rows, day in (("a", "Monday"), ("a", "Friday"), ("b", "Monday"))
    )
    assert told(basis=one) == told(basis=same) != told(basis=other)
    assert told(basis="/home/me/absent.safetensors")["basis"] == "absent.safetensors"


# ---- data and what was made from it


def aligned(pair: tuple[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)


def salora(**given: Any) -> SaLoRA:
    return SaLoRA(rank=4, task_rank=0, **given)


def exchanges(pair: tuple[str, str], folder: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Return by name how to make a method from data, from what was made of it, and from what was made of other."""
    fitting = {"rank": 2, "max_steps": 2}

    def basis(rows: Any, sides: Any) -> SafetyBasis:
        # Of more layers, sides and directions than are needed, as one from a file usually is.
        return SafetyBasis.from_rows(aligned(pair), tiny.tokenizer(), rows, sides=sides, rank=5)

    def vectors(rows: Any) -> str:
        made = train_security_vectors(aligned(pair), rows, tiny.tokenizer(), **fitting)
        return str(made.save(folder / f"vectors-{len(list(folder.iterdir()))}"))

    def direction(unaligned: str) -> AlignmentDirection:
        return AlignmentDirection.from_checkpoints(pair[0], unaligned)

    other = aligned(pair)
    for parameter in other.parameters():
        parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    other.save_pretrained(folder / "other")
    return {
        "salora": (
            lambda: salora(safety_data=REFUSED),
            lambda: salora(basis=basis(REFUSED, ("output", "input")).save(folder / "basis.safetensors")),
            lambda: salora(basis=basis(REFUSED[:-1], ("output",))),
        ),
        "security_vectors": (
            lambda: SecurityVectors(harmful_data=HARMFUL, fitting=fitting),
            lambda: SecurityVectors(vectors(HARMFUL)),
            lambda: SecurityVectors(vectors(HARMFUL[:-1])),
        ),
        "asft": (
            lambda: AsFT(unaligned_model=pair[1]),
            lambda: AsFT(direction=direction(pair[1]).save(folder / "d.safetensors")),
            lambda: AsFT(direction=direction(str(folder / "other"))),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["salora", "security_vectors", "asft"])
def test_what_was_made_from_data_may_take_its_place_and_nothing_else(name, pair, tmp_path):
    """As a basis that of the data that it was measured with."""
    first, same, other = exchanges(pair, tmp_path)[name]
    folder = tmp_path / "run"
    resumable(folder, pair, first()).train()
    resumable(folder, pair, same(), max_steps=2).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    with pytest.raises(ValueError, match="was made with other safety methods or settings: .*`made_from`"):
        resumable(folder, pair, other()).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.slow
def test_a_basis_that_does_not_tell_its_data_is_not_taken_for_them(pair, tmp_path):
    resumable(tmp_path, pair, salora(safety_data=REFUSED)).train()
    basis = SafetyBasis.from_rows(aligned(pair), tiny.tokenizer(), REFUSED, rank=4)
    basis.provenance = {}
    with pytest.raises(ValueError, match="`basis` of SaLoRA was null and is .*; `safety_data` .* is null"):
        resumable(tmp_path, pair, salora(basis=basis)).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_stream_of_other_rows_is_told_by_what_was_measured(pair, tmp_path):
    resumable(tmp_path, pair, salora(safety_data=iter(REFUSED))).train()
    resumable(tmp_path, pair, salora(safety_data=iter(REFUSED))).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`made_from` of SaLoRA was .*rows_sha256"):
        resumable(tmp_path, pair, salora(safety_data=iter(HARMFUL))).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_checkpoints_that_do_not_tell_what_was_made_from_what_are_still_resumed(pair, tmp_path):
    resumable(tmp_path, pair, salora(safety_data=REFUSED)).train()
    folder = tmp_path / "checkpoint-1"
    saved = kept(folder)
    assert saved.pop(LAUNCH) == {"processes": 1, "strategy": "one process"} and saved["SaLoRA"].pop(MADE_FROM)
    keep(folder, saved)
    resumable(tmp_path, pair, salora(safety_data=REFUSED)).train(resume_from_checkpoint=True)


def told(**given: Any) -> Any:
    return settings_of([SaLoRA(**{"safety_data": REFUSED, **given})])["SaLoRA"]


@pytest.mark.slow
def test_every_row_counts_also_behind_the_ten_thousandth():
    rows = [{"prompt": f"{number}", "completion": "no"} for number in range(10_001)]
    assert told(safety_data=rows) != told(safety_data=[*rows[:-1], rows[0]])
    assert told(safety_data=Dataset.from_list(rows)) == told(safety_data=rows)


@pytest.mark.parametrize("kind", [np.int64, np.int8, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_and_torch_are_told_as_numbers(kind):
    rows = {"safety_data": REFUSED}
    assert told(**rows, seed=kind(4)) == told(**rows, seed=4) != told(**rows, seed=kind(8))
    assert told(energy=np.float32(0.5)) == told(energy=0.5)


def test_rows_with_values_of_any_kind_are_told_alike_in_every_process():
    class Own:
        pass

    def rows(number: int) -> list[dict[str, Any]]:
        odd = {"array": np.arange(2000) * number, "set": {"a", "b", f"{number}"}, "own": Own()}
        return [{"prompt": "a", "completion": "b", **odd}]

    assert told(safety_data=rows(1)) == told(safety_data=copy.deepcopy(rows(1))) != told(safety_data=rows(2))
    assert " at 0x" not in json.dumps(told(safety_data=rows(1)))


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 20_000_000)
    before = told(safety_data=path)
    with path.open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"b")
    assert told(safety_data=path) != before


# ---- the adapter


def adapted(pair: tuple[str, str], tmp_path: Path, saved: Any, current: Any) -> None:
    """Save a checkpoint with one adapter and go on with another."""
    method = AsFT(projector="none", weight=0.5)
    resumable(tmp_path, pair, method, peft_config=saved).train()
    trainer = resumable(tmp_path, pair, AsFT(projector="none", weight=0.5), peft_config=current)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "current",
    [
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": {"q_proj", "v_proj"}},
        {"target_modules": r".*\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["o_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 0]},
    ],
)
def test_the_same_layers_in_other_words_are_the_same_adapter(current, pair, tmp_path):
    adapted(pair, tmp_path, lora(target_modules=["q_proj", "v_proj"]), lora(**current))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("current", "message"),
    [
        ({"target_modules": ["q_proj"]}, "it trained `model.layers.0.self_attn.v_proj`, .* which this run does not"),
        ({"target_modules": "all-linear"}, "this run trains `model.layers.0.mlp.down_proj`, .*of which it has no"),
        ({"layers_to_transform": [0]}, "it trained `model.layers.1.self_attn.q_proj`, `[^`]*1.self_attn.v_proj`, w"),
        ({"bias": "lora_only"}, "`bias` was .none. and is .lora_only."),
        ({"modules_to_save": ["lm_head"]}, "this run trains `lm_head.weight`, of which it has no weights"),
    ],
    ids=str,
)
def test_other_layers_than_the_checkpoint_s_are_refused_by_name(current, message, pair, tmp_path):
    before = {"target_modules": ["q_proj", "v_proj"]}
    resumable(tmp_path, pair, None, peft_config=lora(**before)).train()
    model = resumable(tmp_path, pair, None, peft_config=lora(**{**before, **current})).model
    folder = tmp_path / "checkpoint-1"
    assert resolve_checkpoint(str(folder), tmp_path, RunFingerprint(), model) == str(folder)  # TRL would not ask
    fingerprint = RunFingerprint([salora(safety_data=REFUSED)])
    keep(folder, fingerprint.content)
    with pytest.raises(ValueError, match=f"other settings of the adapter: .*{message}"):
        resolve_checkpoint(str(folder), tmp_path, fingerprint, model)


@pytest.mark.slow
def test_weights_of_another_model_are_refused_by_their_shapes(pair, tmp_path):
    resumable(tmp_path, pair, None).train()
    folder, fingerprint = tmp_path / "checkpoint-1", RunFingerprint([salora(safety_data=REFUSED)])
    keep(folder, fingerprint.content)
    model = resumable(tmp_path, pair, None).model
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:, :-1].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"`model.layers.0.\S+` was \[\d+, \d+\] and is \[\d+, \d+\]"):
        resolve_checkpoint(str(folder), tmp_path, fingerprint, model)


@pytest.mark.slow
def test_another_chat_template_is_refused(protected_run, pair, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(protected_run[0], folder)
    trainer = resumable(tmp_path, pair, methods_of(protected_run[1]))
    template = trainer.processing_class.chat_template
    trainer.processing_class.chat_template = template + " "
    with pytest.raises(ValueError, match="another chat template, `chat_template.jinja` in it, .*new run from its"):
        trainer.train(resume_from_checkpoint=str(folder))
    trainer.processing_class.chat_template = template + "\r\n"  # which some models have, and reading a file changes
    (folder / "chat_template.jinja").write_bytes(f"{template}\r\n".encode())
    trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.slow
def test_another_one_of_several_chat_templates_is_refused(protected_run, pair, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(protected_run[0], folder)
    trainer = resumable(tmp_path, pair, methods_of(protected_run[1]))
    tokenizer = trainer.processing_class
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "\r\n"}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(folder)
    for now in (named | {"tool_use": named["default"] + "!"}, {"default": named["default"]}, named["default"]):
        tokenizer.chat_template = now
        with pytest.raises(ValueError, match="another chat template, `tool_use.jinja` in it, "):
            trainer.train(resume_from_checkpoint=str(folder))
    tokenizer.chat_template = named | {"default": "!"}
    with pytest.raises(ValueError, match="another chat template, `chat_template.jinja` in it, "):
        trainer.train(resume_from_checkpoint=str(folder))
    tokenizer.chat_template = named
    trainer.train(resume_from_checkpoint=str(folder))


# ---- processes and strategies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"processes": 2, "strategy": "DDP"},
            "was made by 2 processes with DDP, and this run has one process: .*Launch",
        ),
        ({"processes": 2, "strategy": "ZeRO-2"}, "was made by 2 processes with ZeRO-2"),
        ({"processes": "two"}, "was made by two processes with None, and this run has one process"),
    ],
    ids=str,
)
def test_another_number_of_processes_or_another_strategy_is_refused(change, message, protected_run, pair, tmp_path):
    folder, methods = tmp_path / "checkpoint-1", methods_of(protected_run[1])
    shutil.copytree(protected_run[0], folder)
    keep(folder, kept(folder) | {LAUNCH: change})
    trainer = resumable(tmp_path, pair, methods)
    with pytest.raises(ValueError, match=message) as raised:
        trainer.train(resume_from_checkpoint=str(folder))
    assert "start a new run from its weights" in str(raised.value)


@pytest.mark.slow
def test_the_random_state_of_this_process_must_be_there(protected_run, pair, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(protected_run[0], folder)
    (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
    with pytest.raises(ValueError, match="holds no `rng_state.pth`, .*another number of processes"):
        resumable(tmp_path, pair, methods_of(protected_run[1])).train(resume_from_checkpoint=str(folder))


# ---- what is the same after all, and what is another kind of run


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_vocabulary_has_grown_goes_on(tied, pair, tmp_path):
    """PEFT saves its embeddings along with the adapter, though nothing trains them."""

    def grown() -> Any:
        model = AutoModelForCausalLM.from_pretrained(pair[0], tie_word_embeddings=tied)
        model.resize_token_embeddings(tiny.VOCABULARY + 2)
        return model

    method = AsFT(projector="none", weight=0.5)
    resumable(tmp_path, pair, method, model=grown()).train()
    again = resumable(tmp_path, pair, method, model=grown(), max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_any_name_is_compared(name, pair, tmp_path):
    def adapted(alpha: int) -> Any:
        base = AutoModelForCausalLM.from_pretrained(pair[0])
        return get_peft_model(base, lora(lora_alpha=alpha), adapter_name=name)

    method = AsFT(projector="none", weight=0.5)
    resumable(tmp_path, pair, method, model=adapted(8), peft_config=None).train()
    other = resumable(tmp_path, pair, method, model=adapted(64), peft_config=None)
    with pytest.raises(ValueError, match="`lora_alpha` was 8 and is 64"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("only_model", [True, False])
def test_all_weights_and_an_adapter_are_not_taken_for_each_other(only_model, pair, tmp_path):
    method = AsFT(projector="none", weight=0.5)
    kinds = {"all weights": None, "an adapter": lora()}
    for kind, config in kinds.items():
        folder = tmp_path / kind
        resumable(folder, pair, method, peft_config=config, save_only_model=only_model).train()
        (other,) = kinds.keys() - {kind}
        trainer = resumable(folder, pair, method, peft_config=kinds[other], save_only_model=only_model)
        with pytest.raises(ValueError, match=f"holds {kind}, and this run trains {other}. Resume with"):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_what_methods_have_read_counts_and_not_what_became_of_the_file(pair, tmp_path):
    file = tmp_path / "harmful.jsonl"
    file.write_text("\n".join(map(json.dumps, HARMFUL)))
    trainer = resumable(tmp_path / "run", pair, methods_of(file))
    file.unlink()
    trainer.train()
    file.write_text("\n".join(map(json.dumps, HARMFUL)))
    resumable(tmp_path / "run", pair, methods_of(file)).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_the_same_rows_in_another_form_go_on(pair, tmp_path):
    file = tmp_path / "harmful.jsonl"
    file.write_text("\n".join(map(json.dumps, HARMFUL)))
    resumable(tmp_path / "run", pair, methods_of(file)).train()
    file.write_text("\r\n".join(map(json.dumps, HARMFUL)))
    for harmful in (file, HARMFUL):
        resumable(tmp_path / "run", pair, methods_of(harmful)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`harmful_data` of SecurityVectors was"):
        resumable(tmp_path / "run", pair, methods_of(HARMFUL[1:])).train(resume_from_checkpoint=True)


@dataclass
class Worded(SafetyMethod):
    """A method of a user's own that has a text for a setting."""

    text: str

    name = "Worded"
    tag = "worded"


@pytest.mark.parametrize("text", ["word " * 80, "~~~ hello", "a\0b"])
def test_a_text_that_no_path_can_be_is_a_setting_like_others(text):
    assert settings_of([Worded(text)])["Worded"]["text"] == text


def test_a_folder_is_known_by_its_name_however_it_is_reached(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(pair[1]).parent.parent)
    relative = f"{Path(pair[1]).parent.name}/{Path(pair[1]).name}"
    told = [settings_of([AsFT(unaligned_model=path)])["AsFT"]["unaligned_model"] for path in (relative, pair[1])]
    assert told == [Path(pair[1]).name] * 2


# ---- the start


@pytest.mark.slow
@pytest.mark.parametrize("is_lora", [True, False], ids=["LoRA", "all weights"])
def test_a_model_that_was_loaded_from_the_checkpoint_is_no_start(is_lora, pair, tmp_path):
    began = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), lora(init_lora_weights=False))
    began.save_pretrained(tmp_path / "start")

    def run(folder: Path | str, **resuming: Any) -> RefusalAnchor:
        anchor = RefusalAnchor(["Make it."], ["Say it nicely."], answer_tokens=3)
        model: Any = str(folder)
        if is_lora:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), folder, is_trainable=True)
        more = {"peft_config": None, "max_steps": resuming.pop("steps", 3), "bf16": False}
        resumable(tmp_path / "run", pair, anchor, model=model, **more).train(**resuming)
        return anchor

    start, checkpoint = tmp_path / "start" if is_lora else pair[0], tmp_path / "run" / "checkpoint-2"
    first = run(start, steps=2)
    with pytest.raises(ValueError, match="already, so the methods would take.*Give the model that the run began with"):
        run(checkpoint, resume_from_checkpoint=str(checkpoint))
    run(start, steps=4, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="weights of `.*checkpoint-[23]` already"):  # nor is an earlier one
        run(checkpoint, resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = run(start, resume_from_checkpoint=str(checkpoint))  # as it advises
    assert [a.start_cost for a in again._pools["held"]] == [a.start_cost for a in first._pools["held"]]
