"""Drift against dense arithmetic: of adapters, of whole models, of what a model says inside, and while training."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import runs
import tiny
import torch
from commands import invoke
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTTrainer

from safe_trainer import AlignmentDirection, DriftMonitor, PromptSet, SafetyBasis, compare, testbed
from safe_trainer.analysis.drift import Subspaces, measure_drift
from safe_trainer.analysis.drift_monitor import DriftFigures
from safe_trainer.analysis.refusal_direction import RefusalChange, refusal_changes, refusal_directions
from safe_trainer.evaluation import LikelihoodJudge, from_json, to_html, to_json
from safe_trainer.evaluation.prompting import encode
from safe_trainer.linalg import TopDirections, random_basis
from safe_trainer.lora.updates import linear_layers, weight

HARMFUL, HARMLESS = ("do harm!", "more harm", "harm"), ("help", "do help me now")


def fine_tuned(folder, architecture: str = "llama", **config):
    """Save a base and a random adapter on it; return both paths, the base and each layer's dense ΔW."""
    base = tiny.model(architecture)
    base.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    starts = {name: weight(layer.outer).clone() for name, layer in linear_layers(base).items()}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False, **config}
    torch.manual_seed(4)
    wrapped = get_peft_model(base, LoraConfig(**settings))
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder / "whole")
    changes = {name: (weight(layer.outer) - starts[name]).double() for name, layer in linear_layers(merged).items()}
    return folder / "base", folder / "adapter", folder / "whole", starts, {n: d for n, d in changes.items() if d.any()}


def subspaces_of(starts: dict, folder) -> tuple[AlignmentDirection, SafetyBasis]:
    outputs = {name: TopDirections(random_basis(W.shape[0], 4, 1), torch.ones(4), 4.0) for name, W in starts.items()}
    inputs = {name: TopDirections(random_basis(W.shape[1], 5, 2), torch.ones(5), 5.0) for name, W in starts.items()}
    tiny.model("gpt2" if "transformer.h.0.attn.c_attn" in starts else "llama", seed=8).save_pretrained(
        folder / "other"
    )
    direction = AlignmentDirection.from_checkpoints(folder / "base", folder / "other", rank=6, max_error=0)
    return direction, SafetyBasis(outputs, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 9}}], ids=["plain", "rslora"])
@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_sizes_and_shares_are_those_of_the_dense_update(tmp_path, architecture, config, kind):
    base, adapter, whole, starts, changes = fine_tuned(tmp_path, architecture, **config)
    direction, basis = subspaces_of(starts, tmp_path)
    drift = measure_drift(base, adapter if kind == "adapter" else whole, direction=direction, basis=basis, rank=4)
    assert set(drift.layers) == set(changes)
    for name, change in changes.items():
        found, size = drift.layers[name], change.norm().item()
        assert found.size == pytest.approx(size, rel=1e-4)
        assert found.relative == pytest.approx(size / starts[name].norm().item(), rel=1e-4)
        parts = {
            "alignment": direction.modules[name].U[:, :4].double().mT @ change,
            "outputs": basis.outputs[name].basis[:, :4].double().mT @ change,
            "inputs": change @ basis.inputs[name].basis[:, :4].double(),
        }
        for figure, part in parts.items():
            assert found.shares[figure] == pytest.approx(part.norm().item() ** 2 / size**2, abs=1e-5)
            side = change.shape[figure == "inputs"]
            assert found.expected[figure] == pytest.approx(4 / side)
    total = math.sqrt(sum(change.square().sum().item() for change in changes.values()))
    weights = math.sqrt(sum(starts[name].double().square().sum().item() for name in changes))
    assert drift.relative == pytest.approx(total / weights, rel=1e-4)
    inside = sum((basis.outputs[n].basis[:, :4].double().mT @ c).square().sum().item() for n, c in changes.items())
    assert drift.share("outputs")[0] == pytest.approx(inside / total**2, rel=1e-4)


@pytest.mark.slow
def test_layers_that_did_not_change_are_left_out_and_strangers_refused(tmp_path):
    base, adapter, whole, _, changes = fine_tuned(tmp_path, target_modules=["q_proj"])
    assert set(measure_drift(base, adapter).layers) == set(measure_drift(base, whole).layers) == set(changes)
    assert measure_drift(base, base).layers == {} and measure_drift(base, base).relative == 0.0
    tiny.model(hidden=64).save_pretrained(tmp_path / "wide")
    for tuned in (adapter, whole):
        with pytest.raises(ValueError, match="does not fit `base`"):
            measure_drift(tmp_path / "wide", tuned)
    narrow = SafetyBasis({"model.layers.0.self_attn.q_proj": TopDirections(random_basis(8, 4, 1), torch.ones(4), 4.0)})
    with pytest.raises(ValueError, match="belong to another model"):
        measure_drift(base, adapter, basis=narrow)
    with pytest.raises(ValueError, match="`rank`"):
        Subspaces.load(rank=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        LoHaConfig(target_modules=["q_proj"], init_weights=False),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["dora", "loha", "ia3"],
)
def test_an_adapter_of_another_kind_is_measured_as_what_merging_it_changes(tmp_path, config):
    base, *_ = fine_tuned(tmp_path)
    torch.manual_seed(5)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "other")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "other")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, merged = measure_drift(base, tmp_path / "other"), measure_drift(base, tmp_path / "merged")
    assert found.relative == pytest.approx(merged.relative, rel=1e-5) and found.relative > 0
    assert set(found.layers) == set(merged.layers)
    prompt = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="changes no weights"):
        measure_drift(base, tmp_path / "prompt")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"], ids=["list", "pattern"])
def test_the_output_head_of_an_adapter_is_not_counted_and_said(tmp_path, targets, caplog):
    base, adapter, *_, changes = fine_tuned(tmp_path, target_modules=targets)
    shutil.copy(base / "config.json", adapter)  # as some trainers leave it beside an adapter
    assert set(measure_drift(base, adapter).layers) == {name for name in changes if name.endswith("q_proj")}
    assert "lm_head" in caplog.text and "not counted" in caplog.text


def test_directions_of_another_model_and_missing_folders_are_refused(tmp_path):
    base, adapter, *_ = fine_tuned(tmp_path)
    strange = {"transformer.h.0.attn.c_attn": TopDirections(random_basis(8, 4, 1), torch.ones(4), 4.0)}
    for basis in (SafetyBasis(strange), SafetyBasis({}, strange)):
        with pytest.raises(ValueError, match="no layer in common"):
            measure_drift(base, adapter, basis=basis)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="no adapter and no complete model"):
            measure_drift(base, missing)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_refusal_directions_are_differences_of_means_at_the_last_token(architecture):
    model, tokenizer = tiny.model(architecture).train(), tiny.tokenizer()
    block = "transformer.h.1" if architecture == "gpt2" else "model.layers.1"
    layer = f"{block}.mlp.c_proj" if architecture == "gpt2" else f"{block}.mlp.down_proj"
    found = refusal_directions(model, tokenizer, HARMFUL, HARMLESS, batch_size=2)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    sums = {}
    model.eval()
    for name in (block, layer):
        means = []
        for prompts in (HARMFUL, HARMLESS):
            seen = []
            module = model.get_submodule(name)
            hook = module.register_forward_hook(
                lambda m, i, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            for ids in encode(model, tokenizer, prompts):  # one by one, without padding
                model(torch.tensor([ids]))
            hook.remove()
            means.append(torch.stack(seen).mean(0))
        sums[name] = means[0] - means[1]
        assert torch.allclose(found[name].float(), sums[name], atol=1e-5)
    with pytest.raises(ValueError, match="Both kinds"):
        refusal_directions(model, tokenizer, HARMFUL, ())


@pytest.mark.slow
def test_change_of_the_refusal_direction_is_its_projection_on_the_old_one(tmp_path):
    old, new = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    change = refusal_changes({"a": old, "gone": old}, {"a": new})
    assert change == {"a": RefusalChange(5.0, pytest.approx(1.8), pytest.approx(0.6))}
    assert change["a"].kept == pytest.approx(0.36)
    base, adapter, whole, _, changes = fine_tuned(tmp_path)
    prompts = (HARMFUL, HARMLESS)
    by_adapter, by_whole = (measure_drift(base, tuned, prompts=prompts) for tuned in (adapter, whole))
    blocks = {"model.layers.0", "model.layers.1"}
    blind = {f"model.layers.0.self_attn.{one}_proj" for one in "qkv"}  # the last token is the template's, everywhere
    assert set(by_adapter.figure("refusal")) == (set(changes) | blocks) - blind
    for name, kept in by_adapter.figure("refusal").items():
        assert kept == pytest.approx(by_whole.figure("refusal")[name], rel=1e-3, abs=1e-3)
    same = measure_drift(base, base, prompts=prompts)
    assert list(same.figure("refusal").values()) == pytest.approx([1.0] * 13)
    assert json.loads(json.dumps(same.to_dict()))["layers"]["model.layers.0"]["refusal"]["kept"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_tokens_and_a_template_that_an_adapter_brings_belong_to_it(tmp_path, use_dora):
    base, *_ = fine_tuned(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start_note|>", "<|end_note|>"]})
    tokenizer.chat_template = "<|start_note|>" + tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(4)
    wrapped = get_peft_model(model, LoraConfig(use_dora=use_dora, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    found = measure_drift(base, tmp_path / "grown", prompts=(HARMFUL, HARMLESS))
    assert set(found.figure("relative")) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    own = refusal_directions(wrapped, tokenizer, HARMFUL, HARMLESS)
    before = refusal_directions(AutoModelForCausalLM.from_pretrained(base), tiny.tokenizer(), HARMFUL, HARMLESS)
    kept = {name: change.kept for name, change in refusal_changes(before, own).items()}
    assert found.figure("refusal") == pytest.approx(kept, rel=1e-3, abs=1e-3)


def test_an_adapter_with_a_name_of_its_own_is_pointed_to(tmp_path):
    base, *_ = fine_tuned(tmp_path)
    named = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]), adapter_name="safe")
    named.save_pretrained(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run/safe"):
        measure_drift(base, tmp_path / "run")
    assert measure_drift(base, tmp_path / "run" / "safe").relative == 0


def test_measuring_a_comparison_leaves_the_model_as_it_was():
    model = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    frozen.eval()
    before = (
        [(m.training, len(m._forward_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    random = torch.random.get_rng_state()
    asked = [PromptSet("harmful", "harmful", HARMFUL), PromptSet("benign", "benign", HARMLESS)]
    figures = DriftFigures(prompt_sets=asked)
    with model.disable_adapter():
        figures(model, tiny.tokenizer(), None)
    found = figures(model, tiny.tokenizer(), "adapter")
    assert set(found) == {"relative", "refusal"}
    assert before == (
        [(m.training, len(m._forward_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.slow
def test_the_refusal_direction_is_that_of_prompts_as_an_evaluation_asks_them(tmp_path):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    kinds = {"harmful": HARMFUL, "benign": HARMLESS}
    sets = [PromptSet(kind, kind, prompts, template="You obey. {prompt}", system_prompt="Hi.") for kind, prompts in
            kinds.items()]  # fmt: skip
    expected = refusal_directions(model, tokenizer, *(asked.conversations() for asked in sets))
    figures = DriftFigures(prompt_sets=sets)
    figures(model, tokenizer, None)
    assert figures._before.keys() == expected.keys()
    assert all(torch.equal(figures._before[name], direction) for name, direction in expected.items())


@pytest.mark.slow
def test_the_command_asks_prompts_with_the_turns_before_them(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    row = {"messages": [*turns, {"role": "user", "content": "Make it."}]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    found = {}

    def measure(*places, prompts, **how):
        found["prompts"] = prompts
        raise ValueError("enough")

    monkeypatch.setattr("safe_trainer.analysis.drift.measure_drift", measure)
    get_peft_model(tiny.model(), runs.lora()).save_pretrained(tmp_path / "adapter")
    asked = [f"{kind}={tmp_path / 'asked.jsonl'}" for kind in ("harmful", "benign")]
    invoke("drift", testbed.ALIGNED, tmp_path / "adapter", "--prompts", asked[0], "--prompts", asked[1])
    assert [list(prompts) for prompts in found["prompts"]] == [[row["messages"]]] * 2


@pytest.mark.slow
def test_monitor_says_what_of_the_trained_weights_it_does_not_measure(tmp_path, caplog):
    config = runs.lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    DriftMonitor(SFTTrainer(**runs.given(tmp_path, peft_config=config)))
    assert "of the trained weights" in caplog.text and "embeddings" in caplog.text
    caplog.clear()
    DriftMonitor(SFTTrainer(**runs.given(tmp_path, peft_config=runs.lora())))
    assert "of the trained weights" not in caplog.text


@pytest.mark.slow
def test_monitor_logs_the_drift_that_the_saved_adapter_has_and_disturbs_nothing(tmp_path):
    def build(monitored: bool):
        def make(**given):
            trainer = SFTTrainer(**given)
            if monitored:
                trainer.add_callback(DriftMonitor(trainer, every=2, basis=basis, rank=4))
            return trainer

        return make

    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    basis = subspaces_of({n: weight(x.outer) for n, x in linear_layers(base).items()}, tmp_path)[1]
    watched = runs.run(build(True), runs.given(tmp_path / "a", peft_config=runs.lora()))
    plain = runs.run(build(False), runs.given(tmp_path / "a", peft_config=runs.lora()))
    runs.assert_same_weights(watched.end, plain.end)
    logs = [entry for entry in watched.trainer.state.log_history if "drift/relative" in entry]
    assert [entry["step"] for entry in logs] == [2, 3]
    losses = [[e["loss"] for e in run.trainer.state.log_history if "loss" in e] for run in (watched, plain)]
    assert losses[0] == losses[1]
    watched.trainer.save_model(str(tmp_path / "adapter"))
    drift = measure_drift(tmp_path / "base", tmp_path / "adapter", basis=basis, rank=4)
    assert logs[-1]["drift/relative"] == pytest.approx(drift.relative, rel=1e-3)
    assert logs[-1]["drift/largest"] == pytest.approx(max(drift.figure("relative").values()), rel=1e-3)
    for figure in ("outputs", "inputs"):
        found = logs[-1][f"drift/{figure}"], logs[-1][f"drift/{figure}_random"]
        assert found == pytest.approx(drift.share(figure), rel=1e-3)
    with pytest.raises(ValueError, match="`every`"):
        DriftMonitor(watched.trainer, every=0)


@pytest.mark.slow
def test_monitor_follows_full_fine_tuning_too(tmp_path):
    given = runs.given(tmp_path)
    trainer = SFTTrainer(**given)
    start = {name: weight(layer.outer).clone() for name, layer in linear_layers(trainer.model).items()}
    trainer.add_callback(DriftMonitor(trainer, every=3))
    trainer.train()
    logged = [entry["drift/relative"] for entry in trainer.state.log_history if "drift/relative" in entry]
    layers = linear_layers(trainer.model)
    moved = sum((weight(layers[name].outer) - W).square().sum().item() for name, W in start.items())
    assert logged == [pytest.approx(math.sqrt(moved / sum(W.square().sum().item() for W in start.values())), rel=1e-3)]


@pytest.mark.slow
def test_monitor_measures_from_the_model_that_it_was_built_on_also_when_training_goes_on(tmp_path):
    trainer = SFTTrainer(**runs.given(tmp_path))
    start = {name: weight(layer.outer).clone() for name, layer in linear_layers(trainer.model).items()}
    trainer.add_callback(DriftMonitor(trainer, every=50))
    for _ in range(2):
        trainer.train()
        moved = sum(
            (weight(linear_layers(trainer.model)[n].outer) - W).square().sum().item() for n, W in start.items()
        )
        expected = math.sqrt(moved / sum(W.square().sum().item() for W in start.values()))
        logged = [entry["drift/relative"] for entry in trainer.state.log_history if "drift/relative" in entry]
        assert logged == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.slow
def test_monitor_measures_the_last_step_and_not_the_best_model_that_is_loaded_then(tmp_path):
    def logged(best: bool) -> list[float]:
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        settings = {"max_steps": 3, "learning_rate": 0.5, "load_best_model_at_end": best, "eval_dataset": tiny.rows(4)}
        worse = {"metric_for_best_model": "loss", "greater_is_better": True}
        arguments = runs.given(tmp_path / str(best), peft_config=runs.lora(), **settings, **evaluation, **worse)
        torch.manual_seed(0)
        trainer = SFTTrainer(**arguments)
        trainer.add_callback(DriftMonitor(trainer, every=2))
        trainer.train()
        return [entry["drift/relative"] for entry in trainer.state.log_history if "drift/relative" in entry]

    assert logged(best=True) == logged(best=False)


@pytest.mark.slow
def test_monitor_follows_a_trainer_that_makes_itself_another_model(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [9, 10, 11, 12])] * 6
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, **quiet)
    trainer = Trainer(model_init=lambda: tiny.model(), args=args, train_dataset=rows)
    trainer.add_callback(DriftMonitor(trainer, every=3))
    trainer.train()
    start, end = (linear_layers(model) for model in (tiny.model(), trainer.model))
    moved = math.hypot(*((weight(end[n].outer) - weight(x.outer)).norm().item() for n, x in start.items()))
    size = math.hypot(*(weight(x.outer).norm().item() for x in start.values()))
    logged = [entry["drift/relative"] for entry in trainer.state.log_history if "drift/relative" in entry]
    assert logged == [pytest.approx(moved / size, rel=1e-3)] and logged[0] > 1e-3


def test_monitor_does_not_count_what_rounding_the_weights_before_training_changed(tmp_path):
    trainer = SFTTrainer(**runs.given(tmp_path, bf16=False))
    monitor = DriftMonitor(trainer)
    trainer.model.to(torch.bfloat16)
    monitor.on_train_begin(trainer.args, trainer.state, trainer.control)
    monitor._measure(0)
    assert trainer.state.log_history[-1]["drift/relative"] == 0.0


@pytest.mark.slow
def test_monitor_is_refused_when_it_is_built_where_it_cannot_measure(tmp_path):
    trainer = SFTTrainer(**runs.given(tmp_path, peft_config=runs.lora(use_dora=True)))
    with pytest.raises(ValueError, match="drift monitor does not work with `use_dora=True`"):
        DriftMonitor(trainer)
    strange = SafetyBasis({"model.elsewhere": TopDirections(random_basis(8, 4, 1), torch.ones(4), 4.0)})
    with pytest.raises(ValueError, match="no layer in common"):
        DriftMonitor(SFTTrainer(**runs.given(tmp_path, peft_config=runs.lora())), basis=strange)


@pytest.mark.slow
def test_comparison_and_its_report_show_the_shares_by_layer(tmp_path):
    base, adapter, _, starts, _ = fine_tuned(tmp_path)
    basis = subspaces_of(starts, tmp_path)[1]
    asked = [PromptSet("harmful", "harmful", HARMFUL), PromptSet("benign", "benign", HARMLESS)]
    model = AutoModelForCausalLM.from_pretrained(base)
    figures = DriftFigures(basis=basis, rank=4, prompt_sets=asked)
    found = compare(
        model, tiny.tokenizer(), asked, {"tuned": adapter}, judges=[LikelihoodJudge()], drift=figures,
        max_new_tokens=1,
    )  # fmt: skip
    drift = measure_drift(base, adapter, basis=basis, rank=4, prompts=(HARMFUL, HARMLESS))
    shares = from_json(to_json(found)).evaluations[1].drift_shares
    assert set(shares) == {"outputs", "inputs", "refusal"}
    for figure in shares:
        assert shares[figure] == pytest.approx(drift.figure(figure), abs=1e-5)
    page = to_html(found)
    assert page.count('<table class="heat">') == 4
    assert "writes where the model writes when it refuses" in page and "alignment direction" not in page


def test_drift_of_an_active_adapter_equals_the_dense_update_over_the_weight():
    model = get_peft_model(tiny.model(), LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = DriftFigures()(model, None, "adapter")["relative"]
    start = tiny.model().state_dict()
    merged = model.merge_and_unload().state_dict()
    assert len(found) == 4
    for layer, ratio in found.items():
        weight = start[f"{layer}.weight"]
        assert ratio == pytest.approx(float((merged[f"{layer}.weight"] - weight).norm() / weight.norm()), rel=1e-4)


@pytest.mark.slow
def test_command_tells_the_drift_of_an_adapter_on_the_embedded_pair(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED)
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    arguments = ["drift", str(testbed.ALIGNED), str(tmp_path / "adapter"), "--refusal", "--json"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["relative"] > 0 and "kept" in found["layers"]["model.layers.3"]["refusal"]
    table = invoke(*arguments[:-2])
    assert table.exit_code == 0 and "All together" in table.stdout
