"""The calibration pass: its directions against full decompositions of what layers did, its files, its complaints."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from runs import given, lora
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from safe_trainer import SafeSFTTrainer, SafetyBasis, SaLoRA
from safe_trainer.artifacts.calibration import examples_from, top_directions
from safe_trainer.artifacts.store import save_artifact
from safe_trainer.data import conversation
from safe_trainer.linalg import Sketch
from safe_trainer.lora.updates import linear_layers

REFUSALS = [conversation(f"Make {'very ' * (i % 3)}bad thing {i}.", f"I will not make {i * 7}.") for i in range(12)]


def recorded(model: nn.Module, rows: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each layer's inputs at prompt and at answer tokens, (d_in, n) in float64, from one row at a time."""
    at_prompts: dict[str, list[Tensor]] = {}
    at_answers: dict[str, list[Tensor]] = {}
    start = [0]

    def record(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            at_prompts.setdefault(name, []).append(args[0][0][: start[0]].double().mT)
            at_answers.setdefault(name, []).append(args[0][0][start[0] :].double().mT)

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items() if "lm_head" not in name]
    for row in rows:
        template = tiny.tokenizer().apply_chat_template
        prompt = template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        start[0] = len(prompt)
        with torch.no_grad():
            model.eval()(torch.tensor([whole]))
    for handle in handles:
        handle.remove()
    return tuple({name: torch.cat(parts, dim=1) for name, parts in seen.items()} for seen in (at_prompts, at_answers))


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().mT


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_directions_are_those_of_a_full_svd_of_what_the_layers_did(architecture):
    model = tiny.model(architecture)
    with torch.no_grad():  # biases that are not zero, where there are any
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    at_prompts, at_answers = recorded(model, REFUSALS)
    basis = SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, sides=("output", "input"), rank=12, batch_size=5)
    assert basis.outputs.keys() == basis.inputs.keys() == at_answers.keys() == linear_layers(model).keys()
    for name, X_s in at_answers.items():
        weight = model.get_submodule(name).weight.detach().double()
        W = weight.mT if isinstance(model.get_submodule(name), Conv1D) else weight
        for found, whole in ((basis.inputs[name], at_prompts[name]), (basis.outputs[name], W @ X_s)):
            U, S, _ = torch.linalg.svd(whole)
            assert torch.allclose(found.singular_values.double(), S[:12], rtol=1e-3, atol=1e-5 * S[0].item())
            assert found.total_variance == pytest.approx((S**2).sum().item(), rel=1e-4)
            # No gap is planted in these layers: take the span before the largest gap there is.
            k = int((S[:11] / S[1:12]).argmax()) + 1
            assert (projector(U[:, :k]) - projector(found.basis[:, :k])).norm() < 1e-3, name


@pytest.mark.slow
def test_directions_of_wide_layers_come_from_a_sketch_that_is_narrower():
    model = tiny.model(hidden=160, layers=1)
    (_, inputs), layers = recorded(model, REFUSALS), linear_layers(model)
    examples = examples_from(REFUSALS, tiny.tokenizer())
    found = top_directions(model, layers, examples, rank=12, batch_size=4)["output"]
    for name, X in inputs.items():
        U, S, _ = torch.linalg.svd(model.get_submodule(name).weight.detach().double() @ X)
        k = int((S[:11] / S[1:12]).argmax()) + 1
        assert (projector(U[:, :k]) - projector(found[name].basis[:, :k])).norm() < 0.05, name
        assert torch.allclose(found[name].singular_values.double(), S[:12], rtol=0.01)


def test_answer_tokens_are_those_that_trl_trains_on(tmp_path):
    trainer = SFTTrainer(**given(tmp_path, train_dataset=tiny.rows(9)))
    ours = examples_from(tiny.rows(9), tiny.tokenizer(), samples=9)
    theirs = examples_from(trainer.train_dataset, None, samples=9)
    assert [e.ids for e in ours] == [e.ids for e in theirs]
    assert [e.is_answer for e in ours] == [e.is_answer for e in theirs]
    prepared = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]
    assert sorted(prepared) == sorted((e.ids, e.is_answer) for e in theirs)


def test_packed_rows_are_read_as_the_conversations_that_they_hold(tmp_path):
    rows = {"train_dataset": tiny.rows(9), "max_length": 64}
    packed = SFTTrainer(**given(tmp_path, packing=True, **rows)).train_dataset
    assert len(packed) < 9
    ours, plain = examples_from(packed, None), examples_from(tiny.rows(9), tiny.tokenizer())
    count = [Counter((tuple(e.ids), tuple(e.is_answer)) for e in found) for found in (ours, plain)]
    assert count[0] == count[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]},
        {"prompt": "Hi", "completion": "No."},
        {"instruction": "Hi", "input": "", "output": "No."},
    ],
)
def test_every_form_of_a_conversation_gives_the_same_tokens(row):
    assert examples_from([row], tiny.tokenizer()) == examples_from([conversation("Hi", "No.")], tiny.tokenizer())


def test_rows_come_from_a_file_or_a_stream_as_well(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in REFUSALS))
    expected = examples_from(REFUSALS, tiny.tokenizer(), samples=5)
    assert examples_from(path, tiny.tokenizer(), samples=5) == expected
    assert examples_from(iter(REFUSALS), tiny.tokenizer(), samples=12) != expected
    assert len(examples_from(iter(REFUSALS), tiny.tokenizer(), samples=5)) == 5


def test_the_same_seed_gives_the_same_bits_and_another_one_other_rows():
    model = tiny.model()
    first, again, other = (
        SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=4, samples=6, seed=seed) for seed in (0, 0, 1)
    )
    for name, leading in first.outputs.items():
        assert torch.equal(leading.basis, again.outputs[name].basis)
    assert first.provenance["rows_sha256"] == again.provenance["rows_sha256"] != other.provenance["rows_sha256"]


def test_the_model_runs_once_over_the_rows_and_is_as_before():
    model = tiny.model().train()
    calls = []
    counter = model.model.register_forward_pre_hook(lambda *call: calls.append(1))
    SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, sides=("output", "input"), rank=4, batch_size=5)
    counter.remove()
    assert len(calls) == 3 and model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_calibration_leaves_no_trace():
    model = tiny.model().train()
    model.model.layers[0].mlp.eval()  # on purpose
    model.model.embed_tokens.requires_grad_(False)
    torch.manual_seed(3)
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = torch.get_rng_state()
    SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=4)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert torch.equal(before, torch.get_rng_state())


def test_a_basis_of_default_rank_is_enough_for_every_method_and_leaves_each_layer_a_direction():
    model = tiny.model(hidden=96)
    basis = SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, sides=("output", "input"))
    layers = linear_layers(model)
    for side in ("output", "input"):
        for name, top in basis.side(side).items():
            assert top.basis.shape[1] <= min(64, layers[name].shape[side == "input"] - 1)
    assert SaLoRA(basis=basis).rank <= 64
    basis.check_fits(model, list(layers), ("output", "input"), rank=64)


def test_what_several_layers_read_is_taken_in_once(monkeypatch):
    taken, add = [], Sketch.add
    monkeypatch.setattr(Sketch, "add", lambda sketch, columns: (taken.append(len(columns)), add(sketch, columns)))
    SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS, sides=("input",), rank=4, batch_size=6)
    assert len(taken) == 2 * 2 * 4  # batches, layers; queries, keys and values read the same, as gate and up do


def test_an_adapter_on_the_model_changes_nothing():
    model = tiny.model()
    expected = SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=4)
    adapted = get_peft_model(tiny.model(), lora(init_lora_weights=False))
    found = SafetyBasis.from_rows(adapted, tiny.tokenizer(), REFUSALS, rank=4)
    assert all(torch.equal(expected.outputs[name].basis, found.outputs[name].basis) for name in expected.outputs)
    assert found.outputs.keys() == expected.outputs.keys()


# ---- files


@pytest.fixture(scope="module")
def basis() -> SafetyBasis:
    return SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS, sides=("output", "input"), rank=4)


def test_a_basis_comes_back_from_disk_as_it_was(basis, tmp_path):
    found = SafetyBasis.load(basis.save(tmp_path / "basis.safetensors"))
    assert found.provenance == basis.provenance
    for side in ("output", "input"):
        assert found.side(side).keys() == basis.side(side).keys()
        for name, leading in basis.side(side).items():
            assert torch.equal(found.side(side)[name].basis, leading.basis)
            assert torch.equal(found.side(side)[name].singular_values, leading.singular_values)
            assert found.side(side)[name].total_variance == leading.total_variance
    with safe_open(tmp_path / "basis.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["details"])["layers"]
    name = "model.layers.0.mlp.up_proj"
    assert layers[f"{name}.output"]["captured"] == basis.outputs[name].explained_variance


def test_provenance_says_where_a_basis_comes_from(basis):
    answers = sum(len(tiny.tokenizer()(row["completion"][0]["content"])["input_ids"]) + 2 for row in REFUSALS)
    known = basis.provenance
    assert known["rows"] == len(REFUSALS) and known["rank"] == 4 and known["seed"] == 0
    assert known["answer_tokens"] == answers - len(REFUSALS)  # `<e>` ends an answer; `<a>` is the prompt's
    assert known["prompt_tokens"] == sum(len(row["prompt"][0]["content"]) + 2 for row in REFUSALS)
    assert {"model", "rows_sha256", "versions", "created", "samples", "max_length"} <= known.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "told"), [("I will not do that.", 0), ("Sure, here is how to do it.", 1)])
def test_answers_that_comply_are_not_what_a_basis_is_measured_at(answer, told, tmp_path, caplog):
    rows = [conversation(f"Make a bad thing {i}.", answer) for i in range(12)]
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora()), safety=SaLoRA(safety_data=rows, rank=2))
    warnings = trainer.safety_report["SaLoRA"]["warnings"]
    assert len([text for text in warnings if "only 0% of the answers in `safety_data` refuse" in text]) == told
    found = SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), rows, rank=2).provenance["refusing_answers"]
    assert (found["count"], found["total"]) == (0 if told else 12, 12) and found["low"] <= found["rate"] <= found[
        "high"
    ]
    assert ("`safety_data` refuse" in caplog.text) == bool(told)


def test_a_basis_fits_its_model_wherever_that_lies_and_no_other(basis, tmp_path):
    names, sides = list(basis.outputs), ("output", "input")
    tiny.model().save_pretrained(tmp_path / "copy")
    basis.check_fits(tiny.Auto.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16), names, sides, rank=4)
    basis.check_fits(get_peft_model(tiny.model(), lora()), names, sides, rank=3)
    with pytest.raises(ValueError, match="do not fit the model: .*weights compared .* are equal"):
        basis.check_fits(tiny.model(seed=1), names, sides, rank=4)
    with pytest.raises(ValueError, match="another size .32 entries, not 48"):
        basis.check_fits(tiny.model(hidden=48), names, sides, rank=4)
    with pytest.raises(ValueError, match="no output directions of model.layers.2.*7 in all"):
        deep = tiny.model(layers=3)
        basis.check_fits(deep, list(linear_layers(deep)), ("output",), rank=4)
    with pytest.raises(ValueError, match="no input directions"):
        SafetyBasis(basis.outputs, {}, basis.provenance).check_fits(tiny.model(), names, sides, rank=4)
    with pytest.raises(ValueError, match="measured with `rank=4`, and 5 are wanted"):
        basis.check_fits(tiny.model(), names, sides, rank=5)


def test_a_damaged_file_is_refused(basis, tmp_path):
    path = basis.save(tmp_path / "basis.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    key = "model.layers.0.mlp.up_proj.output.basis"
    tensors = load_file(path)
    for change, complaint in (
        ({key: torch.ones_like(tensors[key])}, "not orthonormal"),
        ({key: tensors[key] * float("nan")}, "not orthonormal"),
        ({key: None}, key),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_artifact(path, "safety basis", 1, changed.items(), json.loads(metadata["details"]))
        with pytest.raises(ValueError, match=f"damaged .*{complaint}"):
            SafetyBasis.load(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        SafetyBasis.load(tmp_path / "other")


# ---- bad input

NO_ANSWER = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": ""}]}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "`safety_data`"),
        ([{"question": "?"}], "(?s)`safety_data`.*row 1 .*no answer"),
        ([NO_ANSWER], "(?s)`safety_data`.*row 1 .*empty text"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "(?s)`safety_data`.*no answer"),
        ([{"text": "Hi. No."}], "`safety_data` holds plain texts.*`prompt` and `completion`"),
        ([conversation("long " * 50, "No.")], "No answer token is left of the 1 rows of `safety_data` within"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_the_reason(rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), rows, rank=4, max_length=64)


def test_rows_whose_answer_is_cut_away_are_left_out():
    rows = [*REFUSALS, conversation("long " * 50, "No.")]
    found = SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), rows, rank=4, max_length=64)
    assert found.provenance["rows"] == len(REFUSALS)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SafetyBasis.from_rows(tiny.model(), tokenizer, REFUSALS, rank=4)


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_layer():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="The outputs of `model.layers.1.mlp.up_proj` are infinite or NaN"):
        SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=4)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_rank_that_leaves_a_layer_nothing_is_refused_by_the_name_of_the_layer():
    with pytest.raises(ValueError, match="must be below 16, the output size of `model.layers.0.self_attn.k_proj`"):
        SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS, rank=16)


def test_too_few_tokens_give_fewer_directions_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        found = SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS[:1], rank=15, max_length=26)
    tokens = found.provenance["answer_tokens"]
    # The first layer's projections see what is written, and of some tokens the same twice.
    assert max(leading.basis.shape[1] for leading in found.outputs.values()) == tokens < 15
    assert "The 1 rows of `safety_data` span fewer than `rank=15` directions in 14 places" in caplog.text


def test_inputs_of_rows_without_prompts_are_refused():
    rows = [{"input_ids": [5, 6, 7]}]
    assert SafetyBasis.from_rows(tiny.model(), None, rows, rank=2).outputs
    with pytest.raises(ValueError, match="The rows have no prompts"):
        SafetyBasis.from_rows(tiny.model(), None, rows, rank=2, sides=("input",))


def test_a_layer_that_sees_no_tokens_is_refused():
    model = tiny.model()
    model.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="`extra` was not run"):
        SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=2)


def test_a_layer_that_sees_the_tokens_in_another_order_is_refused():
    model = tiny.model()
    router = model.model.layers[0].mlp.up_proj
    router.register_forward_pre_hook(lambda module, args: (args[0][:, ::2],))
    with pytest.raises(ValueError, match="`model.layers.0.mlp.up_proj` sees .* it is not known which of them belong"):
        SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, rank=2)


# ---- several processes


def measure_on(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = tiny.model(seed=rank)  # as if the second had not been given the weights
    basis = SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, sides=("output", "input"), rank=4)
    basis.save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_all_processes_take_the_directions_of_the_first(tmp_path: Path):
    mp.spawn(measure_on, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    alone = SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS, rank=4).outputs
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[f"{name}.output.basis"], alone[name].basis) for name in alone)


def test_a_lora_of_another_kind_is_measured_all_the_same():
    model = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    names = [name for name in linear_layers(model) if "q_proj" in name]
    assert list(SafetyBasis.from_rows(model, tiny.tokenizer(), REFUSALS, modules=names, rank=4).outputs) == names


def test_a_missing_chat_template_is_no_fault_of_the_row():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="Row 1 of `safety_data` cannot be used: .*no chat template") as failed:
        examples_from([conversation("Do harm", "No.")], tokenizer, samples=1, seed=0, argument="safety_data")
    assert "Fix the row" not in str(failed.value)
