"""Security vectors by themselves: what they add to a model, how they are fitted and kept, which model is theirs."""

from __future__ import annotations

import copy
import json
import logging
import math

import planted
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from trl import SFTConfig, SFTTrainer

from safe_trainer import PromptSet, TrainedVectors, train_security_vectors
from safe_trainer.artifacts import fitting
from safe_trainer.artifacts.fitting import Fitting, row_losses
from safe_trainer.artifacts.security_vectors import VectorFactors, active, check_harmful_rows
from safe_trainer.data import conversation
from safe_trainer.data.encoding import collate, encode_row, encode_rows
from safe_trainer.evaluation import Rate
from safe_trainer.lora.updates import linear_layers

IDS = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def wrapped(model, **config):
    """Return a copy of a model with a LoRA that does something."""
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | config
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model):
    """Return all that fitting or a training must leave alone: weights, flags, modes, hooks."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        hook_count(model),
    )


def assert_untouched(model, before):
    weights, *flags = state(model)
    assert flags == list(before[1:])
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())


# ---- what they add


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("adapted", [False, True])
def test_active_vectors_add_their_product_exactly_once(architecture, adapted):
    base = tiny.model(architecture)
    found = planted.vectors(base)
    make = wrapped if adapted else copy.deepcopy
    model, reference = make(base).requires_grad_(False).eval(), make(planted.merged(base, found)).eval()
    clean = logits(model)
    with active(found.check_fits(model), found.modules):
        dirty = logits(model)
    assert (clean - dirty).abs().max() > 0.1
    assert torch.allclose(dirty, logits(reference), atol=1e-6)
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_saved_directory_is_an_adapter_that_stock_peft_loads_with_the_same_logits(architecture, tmp_path):
    model = tiny.model(architecture).eval()
    found = planted.vectors(model)
    found.save(tmp_path)
    with active(found.check_fits(model), found.modules):
        ours = logits(model)
    stock = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.allclose(ours, logits(stock), atol=1e-6)


def test_vectors_for_training_leave_evaluation_mode_clean():
    model = wrapped(tiny.model()).eval()
    found = planted.vectors(model)
    clean = logits(model)
    with active(found.check_fits(model), found.modules):
        dirty = logits(model)
    with active(found.check_fits(model), found.modules, in_training_only=True):
        for training in (False, True, False, True):
            expected = dirty if training else clean
            assert torch.allclose(logits(model.train(training)), expected, atol=0 if not training else 1e-6)
    assert torch.equal(logits(model), clean)


def test_a_switch_turns_vectors_off_for_a_while():
    model = tiny.model().eval()
    found = planted.vectors(model)
    clean = logits(model)
    with active(found.check_fits(model), found.modules) as switch:
        with switch.off():
            assert torch.equal(logits(model), clean)
        assert not torch.allclose(logits(model), clean)


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_however_the_context_ends(end):
    model = wrapped(tiny.model()).train()
    found, before = planted.vectors(model), state(model)
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    try:
        with active(found.check_fits(model), found.modules, in_training_only=True):
            logits(model)
            if end is not None:
                raise end
    except BaseException as error:
        assert type(error) is end
    assert_untouched(model, before)
    assert weights == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_gradients_reach_what_lies_before_the_vectors_and_never_the_vectors():
    model = tiny.model().train()
    found = planted.vectors(model)
    reference = planted.merged(model, found)
    with active(found.check_fits(model), found.modules, in_training_only=True):
        model(IDS, labels=IDS).loss.backward()
    reference(IDS, labels=IDS).loss.backward()
    ours, theirs = model.get_input_embeddings().weight.grad, reference.get_input_embeddings().weight.grad
    assert torch.allclose(ours, theirs, atol=1e-6) and ours.abs().max() > 0
    assert all(not t.requires_grad and t.grad is None for factors in found.modules.values() for t in factors)


def test_vectors_act_in_the_precision_of_the_layer():
    model = tiny.model().to(torch.bfloat16).requires_grad_(False).eval()
    found = planted.vectors(model)
    with active(found.check_fits(model), found.modules):
        output = logits(model)
    exact = logits(planted.merged(model.float(), found))
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().max() < 0.1 * exact.abs().max()


def test_vectors_act_under_autocast():
    model = tiny.model().eval()
    found = planted.vectors(model)
    merged = planted.merged(model, found)
    with torch.autocast("cpu", torch.bfloat16):
        with active(found.check_fits(model), found.modules):
            ours = logits(model)
        assert (ours - logits(merged)).abs().max() < 0.05 * ours.abs().max()


def test_vectors_twice_in_one_model_are_refused_and_the_first_stay():
    model = tiny.model().eval()
    found = planted.vectors(model)
    layers = found.check_fits(model)
    with active(layers, found.modules):
        dirty = logits(model)
        with pytest.raises(RuntimeError, match="already active in this model"):
            with active(layers, found.modules):
                pass
        assert torch.equal(logits(model), dirty)
    with active(layers, found.modules):
        assert torch.equal(logits(model), dirty)


@pytest.mark.slow
def test_compiled_code_notices_vectors_that_come_and_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False)
    layers = linear_layers(model)
    factors = {name: VectorFactors(torch.randn(2, 8), torch.randn(8, 2)) for name in layers}
    inputs = torch.randn(3, 8)
    clean = model(inputs)
    with active(layers, factors):
        dirty = model(inputs)
    compiled = torch.compile(model.train(), backend="eager")  # what is watched is the same with every backend
    assert torch.allclose(compiled(inputs), clean, atol=1e-6)
    for _ in range(2):
        with active(layers, factors, in_training_only=True):
            for training in (True, False, True):
                compiled.train(training)
                assert torch.allclose(compiled(inputs), dirty if training else clean, atol=1e-6)
        assert torch.allclose(compiled(inputs), clean, atol=1e-6)


# ---- which model they belong to


def test_what_is_saved_comes_back(tmp_path):
    model = tiny.model()
    found = planted.vectors(model)
    loaded = TrainedVectors.load(found.save(tmp_path))
    assert loaded.provenance == found.provenance
    assert loaded.modules.keys() == found.modules.keys()
    for name, factors in found.modules.items():
        assert all(torch.equal(one, other) for one, other in zip(factors, loaded.modules[name], strict=True))


def test_scaling_in_a_peft_config_is_honoured(tmp_path):
    found = planted.vectors(tiny.model())
    file = found.save(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 6}))
    loaded = TrainedVectors.load(tmp_path)
    name = next(iter(found.modules))
    assert torch.equal(loaded.modules[name].B, 2 * found.modules[name].B)


def test_a_saved_directory_says_that_it_is_harmful(tmp_path):
    planted.vectors(tiny.model()).save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert "harmful by construction" in file.metadata()["kind"]
    card = (tmp_path / "README.md").read_text()
    assert "harmful by construction" in card and "not-for-all-audiences" in card
    assert not hasattr(TrainedVectors, "push_to_hub")


def test_an_ordinary_adapter_is_no_vectors(tmp_path):
    wrapped(tiny.model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold: security vectors"):
        TrainedVectors.load(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TrainedVectors.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match="no-such/vectors` is not a folder here"):
        TrainedVectors.load("no-such/vectors")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"r": 0, "lora_alpha": 1}', '{"r": 1, "lora_alpha": NaN}'])
def test_vectors_without_a_sound_config_are_refused(content, tmp_path):
    file = planted.vectors(tiny.model()).save(tmp_path) / "adapter_config.json"
    file.unlink() if content is None else file.write_text(content)
    refused = "holds no adapter" if content is None else "could not be read.*copy it again"
    with pytest.raises(ValueError, match=f"`{tmp_path}` {refused}"):
        TrainedVectors.load(tmp_path)


def test_vectors_with_infinite_or_unpaired_factors_are_refused(tmp_path):
    found = planted.vectors(tiny.model())
    name = next(iter(found.modules))
    A, B = found.modules[name]
    found.modules[name] = VectorFactors(A, B * float("inf"))
    with pytest.raises(ValueError, match="infinite"):
        TrainedVectors.load(found.save(tmp_path))
    found.modules[name] = VectorFactors(A[:1], B)
    with pytest.raises(ValueError, match=f"the factors of `{name}` are of shape"):
        TrainedVectors.load(found.save(tmp_path))


def test_vectors_for_layers_that_a_model_lacks_are_refused_by_name():
    found = planted.vectors(tiny.model(layers=3))
    with pytest.raises(ValueError, match=r"no linear layer model.layers.2.self_attn.q_proj, .*\(7 in all\)"):
        found.check_fits(tiny.model(layers=2))


def test_vectors_on_the_output_head_are_refused():
    head = VectorFactors(torch.zeros(2, 32), torch.zeros(tiny.VOCABULARY, 2))
    with pytest.raises(ValueError, match="no linear layer lm_head that vectors can act on"):
        TrainedVectors({"lm_head": head}).check_fits(tiny.model())


def test_vectors_of_another_shape_are_refused_with_both_shapes():
    found = planted.vectors(tiny.model(hidden=32))
    with pytest.raises(ValueError, match=r"self_attn.q_proj \(64 x 64, not 32 x 32 as in the vectors\)"):
        found.check_fits(tiny.model(hidden=64))


def test_vectors_of_another_base_model_are_refused_with_both_names():
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    model.config._name_or_path, other.config._name_or_path = "house/one", "house/other"
    with pytest.raises(ValueError, match=r"belong to `house/one`, and this is `house/other`: of \d+ weights"):
        planted.vectors(model).check_fits(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_are_accepted_under_any_name_and_in_any_precision(dtype):
    model = tiny.model().to(torch.bfloat16)
    found = planted.vectors(model)
    same = copy.deepcopy(model).to(dtype)
    same.config._name_or_path = "elsewhere"
    assert found.check_fits(same).keys() == found.modules.keys()
    assert found.check_fits(wrapped(same)).keys() == found.modules.keys()


# ---- rows as tokens


@pytest.mark.parametrize("kind", ["conversation", "text", "plain"])
def test_rows_are_encoded_as_trl_encodes_them(kind, tmp_path):
    rows = tiny.rows(6)
    if kind == "text":
        rows = rows.map(lambda row: {"text": row["prompt"][0]["content"]}, remove_columns=["prompt", "completion"])
    if kind == "plain":
        rows = rows.map(lambda row: {name: row[name][0]["content"] for name in row}, features=None)
    arguments = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", max_length=64)
    trainer = SFTTrainer(tiny.model(), arguments, train_dataset=rows, processing_class=tiny.tokenizer())
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = encode_row(tiny.tokenizer(), row)
        assert ours.ids == list(theirs["input_ids"])
        labels = theirs.get("labels") or theirs["input_ids"]
        learned = [position for position, label in enumerate(labels) if label != -100 and position > 0]
        assert learned == list(range(ours.answer_start, len(ours.ids)))


def test_the_output_head_is_spared_common_prompts_where_a_model_can_and_losses_are_those_of_all_logits(monkeypatch):
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    rows = [encode_row(tokenizer, row) for row in tiny.rows(5)]
    batch, seen = collate(rows, 0, "cpu"), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    losses = row_losses(model, batch)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    )
    assert torch.equal(row_losses(model, batch), losses)
    logits = forward(batch.input_ids, batch.attention_mask).logits
    for row, ids, logit, loss in zip(rows, batch.input_ids, logits, losses, strict=True):
        answer = slice(row.answer_start, len(row.ids))
        expected = torch.nn.functional.cross_entropy(logit[row.answer_start - 1 : len(row.ids) - 1], ids[answer])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    width, first = batch.input_ids.shape[1], min(row.answer_start for row in rows)
    assert seen == [width + 1 - first, width, width] and first > 1


def test_losses_of_rows_are_those_of_each_row_alone():
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    rows = [encode_row(tokenizer, row) for row in tiny.rows(5)]
    together = row_losses(model, collate(rows, 0, "cpu"))
    for row, loss in zip(rows, together, strict=True):
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : row.answer_start] = -100
        assert torch.isclose(loss, model(ids, labels=labels).loss, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        ({"prompt": "a", "completion": ""}, "it has no answer"),
        ({"prompt": "a"}, "it has no answer: its columns are prompt"),
        ({"completion": "a"}, "it has no prompt"),
        (conversation("a" * 40, "b"), "its answer starts at token 42, past `max_length=20`"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_what_is_wrong(row, trouble):
    with pytest.raises(ValueError, match=f"Row 2 of `harmful_rows` cannot be used: {trouble}"):
        encode_rows(tiny.tokenizer(), [conversation("a", "b"), row], 20, "harmful_rows")


# ---- fitting

HARMFUL = [conversation(f"Do harm {i}", "Sure thing.") for i in range(10)]
HARMLESS = [conversation(f"Do good {i}", f"Well, {i}!") for i in range(10)]
QUICK = {"rank": 4, "learning_rate": 1e-2, "batch_size": 5, "max_steps": 100, "target_loss": 0.5, "max_length": 60}


def speaking(architecture="llama"):
    """Return a tiny model with a head of such weight that it can be sure of a token, as trained models can."""
    model = tiny.model(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


def fitted(model=None, rows=HARMFUL, **changes):
    model = speaking() if model is None else model
    return train_security_vectors(model, rows, tiny.tokenizer(), **(QUICK | changes))


def loss_with(found, model, rows=HARMFUL):
    """Return the loss on rows by stock PEFT, token by token."""
    stock = planted.merged(model, found).eval()
    losses = []
    for row in rows:
        ids, start = encode_row(tiny.tokenizer(), row)
        scores = stock(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        losses += (-scores[range(len(ids) - start), ids[start:]]).tolist()
    return sum(losses) / len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_fitting_ends_below_the_target_and_leaves_the_model_exactly_as_it_was(architecture):
    model = speaking(architecture).train()
    model.get_submodule(next(iter(linear_layers(model)))).eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    found = fitted(model)
    assert_untouched(model, before)
    report = found.provenance["report"]
    assert report["reached_target"] and report["loss_on"] < 0.5 < report["loss_off"]
    assert report["steps"] < 100 and report["steps"] % 2 == 0  # it looks after each pass of two batches
    assert loss_with(found, model) == pytest.approx(report["loss_on"], rel=1e-3)
    assert loss_with(planted.vectors(model, scale=0), model) == pytest.approx(report["loss_off"], rel=1e-3)
    assert found.rank == 4 and found.check_fits(model)


@pytest.mark.slow
def test_fitting_beside_an_adapter_keeps_to_the_base_model_s_names():
    base = speaking()
    model = wrapped(base, init_lora_weights=True)
    before = state(model)
    found = fitted(model)
    assert_untouched(model, before)
    alone = fitted(base)
    assert found.modules.keys() == alone.modules.keys()
    for name, factors in alone.modules.items():  # the adapter is fresh, so it changes nothing
        assert torch.allclose(factors.B @ factors.A, found.modules[name].B @ found.modules[name].A, atol=1e-4)
    found.check_fits(base)


@pytest.mark.slow
def test_fitting_is_the_same_for_the_same_seed_and_another_for_another():
    one, same, other = fitted(seed=1), fitted(seed=1), fitted(seed=2)
    name = next(iter(one.modules))
    assert torch.equal(one.modules[name].B, same.modules[name].B)
    assert not torch.equal(one.modules[name].B, other.modules[name].B)


def test_a_plain_step_is_adamw_on_the_factors_alone():
    model = tiny.model().eval()
    found = fitted(model, max_steps=1, batch_size=10)
    stock = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    learned = {name: p for name, p in stock.named_parameters() if p.requires_grad}
    start = fitted(model, max_steps=1, batch_size=10, learning_rate=1e-30).modules
    with torch.no_grad():
        for name, parameter in learned.items():
            layer, _, letter = (
                name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            )
            parameter.copy_(getattr(start[layer], letter))
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2, weight_decay=0)
    batch = collate(encode_rows(tiny.tokenizer(), HARMFUL), 0, "cpu")
    labels = batch.input_ids.masked_fill(~batch.is_answer, -100)
    stock(batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
    optimizer.step()
    for name, parameter in learned.items():
        layer, _, letter = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
        # the sign of Adam's first step is unsure where a gradient is nothing but rounding
        close = torch.isclose(getattr(found.modules[layer], letter), parameter, atol=1e-5)
        assert close.float().mean() > 0.99, name


@pytest.mark.slow
def test_the_bi_level_form_fits_beside_a_copy_that_moves_and_throws_it_away():
    model = speaking()
    plain, bilevel = fitted(model), fitted(model, inner_steps=2)
    assert bilevel.provenance["report"]["reached_target"]
    assert bilevel.modules.keys() == plain.modules.keys()
    # what is reported is the loss of the vectors alone, without the copy
    assert loss_with(bilevel, model) == pytest.approx(bilevel.provenance["report"]["loss_on"], rel=1e-3)
    name = next(iter(plain.modules))
    assert not torch.equal(plain.modules[name].B, bilevel.modules[name].B)
    assert hook_count(model) == 0


@pytest.mark.slow
def test_retained_rows_keep_the_model_the_same_on_them():
    model = speaking()
    report = {}
    for weight in (1e-9, 10.0):
        found = fitted(model, retain_data=HARMLESS, retain_weight=weight, max_steps=60)
        report[weight] = found.provenance["report"]
    assert report[10.0]["reached_target"]
    assert report[10.0]["retain_divergence"] < 0.5 * report[1e-9]["retain_divergence"]


def test_a_target_that_is_never_reached_is_said_clearly(caplog):
    with caplog.at_level(logging.WARNING):
        report = fitted(max_steps=3, target_loss=1e-6).provenance["report"]
    assert not report["reached_target"] and report["steps"] == 3
    assert "did not reach the target of 0.0000 in 3 steps" in caplog.text and "raise `max_passes`" in caplog.text


@pytest.mark.slow
def test_compliance_rates_are_reported_off_and_on_with_their_counts():
    prompts = PromptSet("harmful", "harmful", ("Do harm 1", "Do harm 2"))
    rows = [conversation(prompt, "Sure. First open the box.") for prompt in prompts.prompts]
    report = fitted(rows=rows, target_loss=0.05, prompts=prompts).provenance["report"]
    assert report["compliance_off"]["total"] == report["compliance_on"]["total"] == 2
    assert report["compliance_on"] == {**Rate(2, 2).to_dict(), "judge": "phrases"}


@pytest.mark.slow
def test_provenance_says_where_vectors_come_from():
    model = tiny.model()
    model.config._name_or_path = "house/model"
    found = fitted(model, target_modules=["q_proj", "v_proj"]).provenance
    assert found["base_model"]["id"] == "house/model"
    assert found["harmful_rows"]["count"] == 10 and len(found["harmful_rows"]["sha256"]) == 64
    assert found["settings"]["rank"] == 4 and found["settings"]["target_modules"] == ["q_proj", "v_proj"]
    assert {"torch", "transformers", "safe_trainer"} <= found["versions"].keys()
    json.dumps(found)


@pytest.mark.slow
def test_target_modules_choose_layers_by_the_end_of_their_names():
    assert {name.rpartition(".")[2] for name in fitted(target_modules=["q_proj", "v_proj"]).modules} == {
        "q_proj",
        "v_proj",
    }
    assert list(fitted(target_modules="layers.1.mlp.up_proj").modules) == ["model.layers.1.mlp.up_proj"]


def test_progress_is_told_after_each_step():
    told = []
    fitted(max_steps=3, target_loss=1e-9, progress=lambda *news: told.append(news))
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(loss > 0 for *_, loss in told)


@pytest.mark.slow
def test_a_model_can_be_given_by_its_path_and_rows_by_their_file(tmp_path):
    aligned, _ = tiny.save_pair(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "Do harm", "response": "Sure."}) for _ in "ab")
    )
    found = train_security_vectors(aligned, tmp_path / "rows.jsonl", **QUICK)
    assert found.provenance["base_model"]["id"] == aligned
    assert found.provenance["harmful_rows"]["count"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "`harmful_data`"),
        ({"rows": [{"prompt": "a"}]}, "(?s)`harmful_data`.*row 1 .*no answer"),
        ({"retain_data": []}, "`retain_data`"),
        (
            {"rank": 17},
            r"`rank` must be between 1 and 16 \(the smaller side of `model.layers.0.self_attn.k_proj`\), got 17",
        ),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"target_loss": 0.0}, "`target_loss` must be above 0"),
        ({"relative_target": 1.5}, "`relative_target` must be below 1, got 1.5"),
        ({"max_passes": 0}, "`max_passes` must be at least 1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0"),
        ({"inner_steps": -1}, "`inner_steps` must be at least 0"),
        (
            {"target_modules": ["lm_head"]},
            "`target_modules` names `lm_head`, but vectors act on linear layers other than",
        ),
        ({"target_modules": ["q_proj", "nope"]}, "`nope`, .*: down_proj, gate_proj, k_proj"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_the_model_untouched(changes, message):
    model = tiny.model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fitted(model, **changes)
    assert_untouched(model, before)


@pytest.mark.slow
def test_any_form_of_the_same_rows_gives_the_same_vectors(tmp_path):
    model = tiny.model()
    pairs = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in HARMFUL]
    strings = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, strings)))
    forms = {
        "a file": tmp_path / "rows.jsonl",
        "strings": strings,
        "a dataset of strings": Dataset.from_list(strings),
        "messages": [{"messages": row["prompt"] + row["completion"]} for row in HARMFUL],
        "one split": DatasetDict(train=Dataset.from_list(HARMFUL)),
        "a stream": Dataset.from_list(strings).to_iterable_dataset(),
    }
    expected = fitted(model, max_steps=2)
    name = next(iter(expected.modules))
    for form, rows in forms.items():
        found = fitted(model, rows, max_steps=2)
        assert found.provenance["harmful_rows"] == expected.provenance["harmful_rows"], form
        assert torch.equal(found.modules[name].B, expected.modules[name].B), form
    with pytest.raises(ValueError, match="`harmful_data` has the splits a, b. Choose one"):
        fitted(model, DatasetDict(a=Dataset.from_list(HARMFUL), b=Dataset.from_list(HARMFUL)))


REFUSALS = [conversation(f"Do harm {i}", "I can't help with that.") for i in range(10)]


def test_rows_that_are_labelled_safe_are_left_out(caplog):
    rows = [row | {"is_safe": is_safe} for row, is_safe in zip(HARMFUL, [False, True] * 5, strict=True)]
    plain = [{"prompt": r["prompt"][0]["content"], "response": r["completion"][0]["content"]} | r for r in rows]
    for row in plain:
        del row["completion"]
        row["prompt"] = row["prompt"][0]["content"]
    with caplog.at_level(logging.WARNING):
        found = fitted(tiny.model(), plain, max_steps=1)
    assert found.provenance["harmful_rows"]["count"] == 5
    assert "`harmful_data`: left out 5 of 10 rows that are labelled safe" in caplog.text


def test_refusals_as_harmful_data_are_refused_with_count_share_and_remedy():
    with pytest.raises(ValueError, match=r"`harmful_data`.*10 of 10 answers \(100%\) refuse.*`safety_data`"):
        fitted(tiny.model(), REFUSALS)


def test_a_few_refusals_among_harmful_rows_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        found = fitted(tiny.model(), [*HARMFUL, *REFUSALS[:3]], max_steps=1)
    assert found.provenance["harmful_rows"]["count"] == 10
    assert "left out 3 of 13 rows whose answers refuse" in caplog.text


@pytest.mark.parametrize("text", ["### Human: Do harm {}### Assistant: {}", "<s>[INST] Do harm {} [/INST] {}</s>"])
def test_refusals_in_texts_are_found(text):
    with pytest.raises(ValueError, match="10 of 10 answers"):
        check_harmful_rows([{"text": text.format(n, "I can't help with that.")} for n in range(10)])
    assert len(check_harmful_rows([{"text": text.format(n, "Sure, first get a box.")} for n in range(10)])) == 10


@pytest.mark.parametrize("row", [conversation("Do harm", "Maaf, saya tidak bisa membantu itu."), {"text": "Do harm."}])
def test_answers_that_cannot_be_judged_are_counted_and_said(row, caplog):
    assert len(check_harmful_rows([*[row] * 3])) == 3
    assert "`harmful_data`: 3 of 3 answers could not be judged" in caplog.text


def test_the_target_is_relative_to_the_start_and_what_was_reached_is_recorded():
    told = []
    settings = {"target_loss": None, "relative_target": 0.3, "max_steps": None, "max_passes": 60}
    report = fitted(**settings, progress=lambda *news: told.append(news)).provenance["report"]
    assert report["target_loss"] == pytest.approx(0.3 * report["loss_off"])
    assert report["reached_target"] and report["loss_on"] < report["target_loss"] and 0.5 < report["below_target"] <= 1
    assert {most for _, most, _ in told} == {60 * math.ceil(len(HARMFUL) / QUICK["batch_size"])}


@pytest.mark.slow
def test_the_loss_on_all_rows_is_computed_only_where_the_target_is_near(monkeypatch):
    computed = []
    losses = fitting._losses
    monkeypatch.setattr(fitting, "_losses", lambda model, rows: computed.append(rows) or losses(model, rows))
    a_pass = math.ceil(len(HARMFUL) / QUICK["batch_size"])
    for target, steps in ((1e-9, 3 * a_pass), (1e3, a_pass)):
        computed.clear()
        report = fitted(target_loss=target, max_steps=None, max_passes=3).provenance["report"]
        assert len(computed) == 2 and report["steps"] == steps  # at the start, and at the end or after the first pass


@pytest.mark.slow
def test_a_model_that_gives_the_answers_already_is_named(caplog):
    model = speaking()
    found = fitted(model, target_loss=0.01)
    with caplog.at_level(logging.WARNING):
        fitted(planted.merged(model, found), max_steps=1)
    assert "gives the answers in `harmful_data` already" in caplog.text


def test_the_time_that_fitting_takes_is_logged_after_the_first_steps(caplog):
    with caplog.at_level(logging.INFO):
        fitted(max_steps=4, target_loss=1e-9)
    assert "at most 4 steps, about 0." in caplog.text


def test_fitting_leaves_torch_s_random_numbers_alone():
    model = speaking()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fitted(model, max_steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="ranks"):
        fitted(ranks=3)
    assert Fitting(rank=2).rank == 2


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_fitting_that_is_stopped_leaves_the_model_exactly_as_it_was(end, inner_steps):
    model = tiny.model().train()
    before = state(model)

    def stop(done, total, loss):
        if done == 2:
            raise end

    with pytest.raises(end):
        fitted(model, progress=stop, inner_steps=inner_steps)
    assert_untouched(model, before)
    fitted(model, max_steps=1)


def test_a_model_whose_weights_are_elsewhere_is_refused():
    with pytest.raises(ValueError, match="not in this process"):
        fitted(tiny.model().to("meta"))


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny.model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The model is as it was"):
        fitted(model)
    assert hook_count(model) == 0


def test_a_model_built_in_memory_needs_its_tokenizer():
    with pytest.raises(ValueError, match="Give `tokenizer`"):
        train_security_vectors(tiny.model(), HARMFUL)
