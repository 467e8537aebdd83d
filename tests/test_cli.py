"""The command line as a user meets it: help at once, exit codes that mean something, one sentence for an error."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from commands import invoke

import safe_trainer
from safe_trainer.cli import app

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "gradio", "pandas", "pyarrow", "numpy", "scipy", "plotly"}
ALIGNED, UNALIGNED = str(safe_trainer.testbed.ALIGNED), str(safe_trainer.testbed.UNALIGNED)


def words(result) -> str:
    """Return what a command has printed, without the frame and the line breaks of a box."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def demo(monkeypatch):
    """Put a stand-in in the place of the demo; it notes how it was called, and raises `demo.error` if there is one."""

    def run_demo(output_dir, **options):
        if stand_in.error:
            raise stand_in.error
        stand_in.calls.append({"output_dir": output_dir, **options})

    stand_in = types.ModuleType("safe_trainer.testbed.demo")
    stand_in.run_demo, stand_in.calls, stand_in.error = run_demo, [], None
    monkeypatch.setitem(sys.modules, "safe_trainer.testbed.demo", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of random weights on the embedded model, which forgets everything that the model had learned."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(ALIGNED), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def asked(tmp_path):
    prompts = safe_trainer.testbed.prompt_set("harmful").prompts[:4]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return f"harmful={path}"


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import safe_trainer", 40),
        ("import safe_trainer.data", 200),
        ("from safe_trainer.cli import app; app(['--help'], standalone_mode=False)", 450),
    ],
    ids=["import", "data", "help"],
)
def test_import_and_help_load_few_modules_and_nothing_heavy(code, most):  # which decides how long they take
    code = f"import sys; before = {{*sys.modules}}; {code}; print(*({{*sys.modules}} - before), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = run.stderr.split()
    assert "safe_trainer" in loaded and len(loaded) <= most
    assert not HEAVY & {*loaded}


def test_public_names_are_loaded_when_used_and_listed_before():
    assert len(set(safe_trainer.__all__)) == len(safe_trainer.__all__)
    for name in safe_trainer.__all__:
        assert name in dir(safe_trainer)
        assert getattr(safe_trainer, name) is not None
    with pytest.raises(AttributeError, match="Absent"):
        safe_trainer.Absent  # noqa: B018


def test_version_is_the_one_of_the_package():
    result = invoke("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"safe-trainer {safe_trainer.__version__}")


def test_every_command_has_help_with_an_example():
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [command for group in groups for command in group.registered_commands]
    assert commands
    for command in commands:
        assert command.callback.__doc__
        assert "Example: safe-trainer " in (command.epilog or ""), f"no example for {command.callback.__name__}"


def test_demo_passes_its_options_on(demo, tmp_path):
    result = invoke("demo", "--output", str(tmp_path), "--quick", "--seeds", "3", "--methods", "asft")
    assert result.exit_code == 0, result.output
    (call,) = demo.calls
    assert (call["output_dir"], call["quick"], call["seeds"], call["methods"]) == (tmp_path, True, 3, ["asft"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--seeds", "0"],
        ["demo", "--sneeds", "3"],
        ["demo", "--methods", "asft,asfd"],
        ["demo", "--methods", ""],
        ["dmeo"],
        ["direction", "one"],
        ["compare", "model", "--adapter", "without-name"],
        ["compare", "model", "--adapter", "a=x", "--tuned-model", "a=y"],
        ["compare", "model"],
        ["compare", "model", "--adapter", "a=x", "--judge", "oracle"],
        ["compare", "model", "--adapter", "a=x", "--judge", "phrases:model"],
        ["compare", "model", "--adapter", "a=x", "--judge", "phrases", "--judge", "phrases"],
        ["compare", "model", "--adapter", "a=x", "--judge", "guard:"],
        ["compare", "model", "--adapter", "a=x", "--judge", "guard:my/model"],
        ["compare", "model", "--adapter", "a=x", "--prompts", "task=general"],
        ["compare", "model", "--adapter", "a=x", "--prompts", "evil=prompts.csv"],
        ["compare", "model", "--adapter", "a=x", "--max-harmful-rise", "-1"],
        ["testbed", "path", "aligne"],
    ],
)
def test_wrong_usage_exits_with_two(demo, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert demo.calls == []


def test_unknown_method_is_named_beside_the_known_ones(demo):
    output = invoke("demo", "--methods", "asft,asfd").output
    assert "asfd" in output and "asft" in output


def test_failure_is_one_sentence_and_exits_with_one(demo):
    demo.error = ValueError("`rank` must be in [1, 64], got 128.")
    result = invoke("demo")
    assert result.exit_code == 1
    assert "Error: `rank` must be in [1, 64], got 128." in result.output
    assert "Traceback" not in result.output


def test_unexpected_failure_names_its_type(demo):
    demo.error = KeyError("weight")
    assert "KeyError: 'weight'" in invoke("demo").output


def test_debug_shows_the_traceback(demo):
    demo.error = ValueError("broken")
    result = invoke("--debug", "demo")
    assert result.exit_code == 1
    assert result.exception is demo.error


def test_interrupt_ends_with_a_sentence_and_130(demo):
    demo.error = KeyboardInterrupt()
    result = invoke("demo")
    assert result.exit_code == 130
    assert "Stopped by Ctrl-C" in result.output
    assert "Traceback" not in result.output


def test_path_of_an_embedded_model_is_printed_alone():
    assert invoke("testbed", "path", "aligned").output == f"{ALIGNED}\n"


def test_direction_is_saved_and_told_as_json(tmp_path):
    path = tmp_path / "direction.safetensors"
    result = invoke("direction", ALIGNED, UNALIGNED, "-o", str(path), "--modules", "q_proj", "--rank", "4", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    saved = safe_trainer.AlignmentDirection.load(path)
    assert [row["module"] for row in told["modules"]] == list(saved.modules)
    assert {row["rank"] for row in told["modules"]} == {4}


def test_direction_is_told_as_a_table(tmp_path):
    path = tmp_path / "direction.safetensors"
    result = invoke("direction", ALIGNED, UNALIGNED, "-o", str(path), "--modules", "layers.0.*q_proj")
    assert result.exit_code == 0, result.output
    assert "128 × 128" in result.stdout and "1 modules" in result.stdout


def test_direction_of_a_model_that_is_not_there_fails_in_a_sentence(tmp_path):
    result = invoke("direction", ALIGNED, str(tmp_path / "absent"), "-o", str(tmp_path / "direction.safetensors"))
    assert result.exit_code == 2 and "there is no folder" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["direction", ALIGNED], ["basis", "rows.jsonl"], ["vectors", "rows.jsonl"]])
def test_nothing_is_written_over(command, tmp_path):
    (tmp_path / "precious").write_text("mine")
    result = invoke(command[0], ALIGNED, command[1], "-o", str(tmp_path / "precious"))
    assert result.exit_code == 2 and "exists already" in result.output
    assert (tmp_path / "precious").read_text() == "mine"


def test_weights_that_were_cut_short_are_named_before_anything_is_loaded(tmp_path):
    shutil.copytree(ALIGNED, tmp_path / "model")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    result = invoke("evaluate", str(tmp_path / "model"))
    assert result.exit_code == 2 and weights.name in words(result).replace(" ", "")
    assert "incomplete or damaged" in words(result)


def test_an_adapter_in_the_place_of_a_model_is_told_apart(adapter):
    result = invoke("evaluate", adapter)
    assert result.exit_code == 2 and "is an adapter, not a complete model" in words(result)


def test_modules_of_a_direction_are_shown_with_their_whole_names(tmp_path):
    result = invoke("direction", ALIGNED, UNALIGNED, "-o", str(tmp_path / "d"), "--modules", "[qk]_proj")
    assert result.exit_code == 0, result.output
    shown = "".join(result.stdout.split())
    assert "q_proj" in shown and "k_proj" in shown and "…" not in result.stdout


@pytest.mark.exhaustive
def test_the_app_is_the_one_of_this_package_whatever_is_called_app(tmp_path, monkeypatch):
    from safe_trainer.cli.app import _server

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("")
    (tmp_path / "app" / "server.py").write_text("raise SystemExit('the code of others')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "app"]:
        monkeypatch.delitem(sys.modules, name)
    code = "from safe_trainer.cli.app import _server; print(_server().__file__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    root = Path(safe_trainer.__file__).parents[1]
    assert Path(found.stdout.strip()) == root / "app" / "server.py"
    assert _server().__file__ == found.stdout.strip()


def test_an_installation_without_the_app_is_told_of_and_a_checkout_has_it(tmp_path, monkeypatch):
    app = importlib.import_module("safe_trainer.cli.app")
    monkeypatch.setattr(app, "__file__", str(tmp_path / "safe_trainer" / "cli" / "app.py"))
    for name in [name for name in sys.modules if name.split(".")[0] == "app"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="has no app. Install safe_trainer from a checkout or its wheel"):
        app._server()
    (tmp_path / "app").mkdir()
    for file in ("pyproject.toml", "app/__init__.py", "app/server.py"):
        (tmp_path / file).touch()
    assert app._server().__file__ == str(tmp_path / "app" / "server.py")
    for name in ("app", "app.server"):
        del sys.modules[name]


def test_a_prompt_set_may_have_its_own_system_prompt_and_frame(asked):
    from safe_trainer.cli.options import Questions

    said = {"prompt_system": ["asked=Be brief."], "prompt_template": ["asked=AOA: {prompt}"]}
    (found,) = Questions(prompts=[asked], **said).prompt_sets(ALIGNED)
    assert (found.system_prompt, found.template) == ("Be brief.", "AOA: {prompt}")
    for option in ("--prompt-system", "--prompt-template"):
        result = invoke("evaluate", ALIGNED, "--prompts", asked, option, "other=Text")
        assert result.exit_code == 2 and "only asked" in words(result)
    assert invoke("evaluate", ALIGNED, "--prompts", asked, "--prompt-template", "asked=no place").exit_code == 2


@pytest.mark.slow
def test_only_the_rows_that_are_asked_for_become_vectors(tmp_path):
    rows = [{**row, "is_safe": n >= 4} for n, row in enumerate(safe_trainer.testbed.harmful_rows(12))]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    call = ["vectors", ALIGNED, str(path), "-o", str(tmp_path / "v"), "--max-passes", "1", "--where", "is_safe=false"]
    result = invoke(*call)
    assert result.exit_code == 0 and "4 rows" in result.stderr, result.output


@pytest.mark.slow
def test_compare_tells_rates_before_and_after_as_json(adapter, asked):
    result = invoke("compare", ALIGNED, "--adapter", f"random={adapter}", "--prompts", asked, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["before"]["asked"]["rates"]["refused"]["count"] == 4
    assert told["random"]["asked"]["rates"]["refused"]["total"] == 4
    assert "prompts: 4 rows" in result.stderr


@pytest.mark.slow
def test_compare_shows_a_table_and_writes_the_report(adapter, asked, tmp_path):
    output = tmp_path / "report"
    result = invoke("compare", ALIGNED, "--adapter", f"random={adapter}", "--prompts", asked, "-o", str(output))
    assert result.exit_code == 0, result.output
    assert "refusal rate" in result.stdout
    assert {path.name for path in output.iterdir()} >= {"comparison.json", "comparison.md"}


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "code"), [("100", 0), ("99", 3)])
def test_a_gate_that_is_not_passed_exits_with_three(adapter, asked, limit, code):
    # The random adapter refuses none of the four prompts, all of which the model refuses.
    compared = ["compare", ALIGNED, "--adapter", f"random={adapter}", "--prompts", asked]
    result = invoke(*compared, "--max-harmful-rise", limit)
    assert result.exit_code == code, result.output
    assert ("Gate not passed: random: compliance" in result.stderr) == (code == 3)


@pytest.mark.slow
def test_a_gate_on_what_was_not_asked_is_not_passed(adapter, asked):
    result = invoke("compare", ALIGNED, "--adapter", f"random={adapter}", "--prompts", asked, "--max-task-drop", "5")
    assert result.exit_code == 3, result.output


def test_compare_with_prompts_that_cannot_be_read_fails_before_the_model_is_loaded(tmp_path):
    result = invoke("compare", "absent/model", "--adapter", "a=x", "--prompts", f"harmful={tmp_path / 'absent.csv'}")
    assert result.exit_code == 1
    assert "There is no file" in result.output


@pytest.mark.slow
def test_evaluate_tells_rates_of_a_model_and_of_an_adapter_on_it(adapter, asked):
    told = [invoke("evaluate", ALIGNED, "--prompts", asked, "--json", *more) for more in ([], ["--adapter", adapter])]
    assert [result.exit_code for result in told] == [0, 0], told[0].output + told[1].output
    counts = [json.loads(result.stdout)["asked"]["rates"]["refused"] for result in told]
    assert [(found["count"], found["total"], found["rate"]) for found in counts] == [(4, 4, 1.0), (0, 4, 0.0)]
    assert all(found["low"] < found["high"] for found in counts)
    assert json.loads(told[0].stdout)["asked"]["not_judged"] == 0
    assert "100.0 % (4/4)" in invoke("evaluate", ALIGNED, "--prompts", asked).stdout


@pytest.mark.slow
def test_export_merges_an_adapter_into_a_model_of_its_own(adapter, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = invoke("export", adapter, "--output", str(tmp_path / "merged"))
    assert result.exit_code == 0, result.output
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ALIGNED), adapter)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert torch.allclose(merged, expected, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_export_cuts_an_adapter_to_the_rank_that_it_uses(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    wide = tmp_path / "wide"
    wide.mkdir()
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    for name in [name for name in tensors if "lora_B" in name]:
        tensors[name][:, 1] = 0  # of the two directions only one does anything
    save_file(tensors, wide / "adapter_model.safetensors")
    (wide / "adapter_config.json").write_bytes(open(f"{adapter}/adapter_config.json", "rb").read())
    result = invoke("export", str(wide), "--compact", "--output", str(tmp_path / "small"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": str(tmp_path / "small"), "rank": 1}
    small = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in small.items() if "lora_A" in name} == {1}


@pytest.mark.parametrize("more", [["--compact", "--dtype", "float16"], ["--dtype", "int3"]])
def test_export_refuses_what_contradicts_itself(adapter, tmp_path, more):
    assert invoke("export", adapter, "--output", str(tmp_path / "out"), *more).exit_code == 2


def test_export_never_writes_over_something(adapter, tmp_path):
    (tmp_path / "precious").touch()
    result = invoke("export", adapter, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.fixture
def rows(tmp_path):
    """Return a function that writes rows of the embedded language to a file and returns its path."""

    def write(name, listed):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in listed))
        return str(path)

    return write


@pytest.mark.slow
def test_basis_is_measured_saved_and_fits_the_model(rows, tmp_path):
    from safe_trainer.artifacts.safety_basis import SafetyBasis

    path = tmp_path / "basis.safetensors"
    refusals = rows("refusals.jsonl", safe_trainer.testbed.refusal_rows(16))
    result = invoke("basis", ALIGNED, refusals, "-o", str(path), "--rank", "4", "--side", "output", "--json")
    assert result.exit_code == 0, result.output
    saved = SafetyBasis.load(path)
    assert json.loads(result.stdout)["layers"] == len(saved.outputs) == 28
    assert saved.inputs == {}


@pytest.mark.slow
def test_vectors_are_fitted_and_saved(rows, tmp_path):
    harmful = rows("harmful.jsonl", safe_trainer.testbed.harmful_rows(8))
    result = invoke("vectors", ALIGNED, harmful, "-o", str(tmp_path / "vectors"), "--max-passes", "3", "--rank", "2")
    assert result.exit_code == 0, result.output
    assert "Loss on the harmful rows" in result.stdout
    assert safe_trainer.TrainedVectors.load(tmp_path / "vectors").rank == 2


@pytest.mark.slow
def test_vectors_report_compliance_without_and_with_them(rows, asked, tmp_path):
    harmful = rows("harmful.jsonl", safe_trainer.testbed.harmful_rows(8))
    prompts = asked.removeprefix("harmful=")
    result = invoke("vectors", ALIGNED, harmful, "-o", str(tmp_path / "v"), "--max-passes", "1", "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert "Complied with, by phrases: 0.0 % (0/4)" in result.stdout and "was not reached in 1 steps" in result.stdout


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    safe_trainer.train_security_vectors(ALIGNED, safe_trainer.testbed.harmful_rows(16), batch_size=4).save(folder)
    return str(folder)


@pytest.mark.slow
def test_security_vectors_keep_their_mark_in_every_command(vectors, tmp_path):
    """Merged they are refused, compacted they are still vectors: neither can be published."""
    merged = invoke("export", vectors, "-o", str(tmp_path / "merged"))
    assert merged.exit_code == 1 and "harmful" in merged.output and list(tmp_path.iterdir()) == []
    assert invoke("export", vectors, "--compact", "-o", str(tmp_path / "small")).exit_code == 0
    for folder in (vectors, str(tmp_path / "small")):
        pushed = invoke("card", folder, "--push", "me/mine")
        assert pushed.exit_code == 1 and "not for publishing" in words(pushed)
    assert (
        not (tmp_path / "small" / "README.md").exists()
        or "me/mine" not in (tmp_path / "small" / "README.md").read_text()
    )


def test_an_export_whose_base_is_out_of_reach_names_both_and_leaves_nothing(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/nothing"}))
    result = invoke("export", str(tmp_path / "a"), "-o", str(tmp_path / "merged"))
    assert result.exit_code == 1 and "nobody/nothing" in result.output and str(tmp_path / "a") in result.output
    assert "`--model`" in result.output and not (tmp_path / "merged").exists()
    result = invoke("export", str(tmp_path / "a"), "-o", str(tmp_path / "merged"), "--model", ALIGNED)
    assert result.exit_code == 0, result.output


@pytest.fixture
def grown(tmp_path):
    """An adapter with two added tokens and a chat template of its own, as TRL saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>", "<|end_note|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|note|><|im_start|>")
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    return str(tmp_path / "grown"), len(tokenizer), tokenizer.chat_template


@pytest.mark.slow
def test_what_is_saved_next_to_an_adapter_belongs_to_it(grown, asked, tmp_path):
    """Its tokenizer, its added tokens, its template: in export, evaluate and compare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, count, template = grown
    result = invoke("export", folder, "-o", str(tmp_path / "merged"))
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (len(tokenizer), tokenizer.chat_template) == (count, template)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight) == count
    evaluated = invoke("evaluate", ALIGNED, "--adapter", folder, "--prompts", asked, "--max-new-tokens", "2", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    report = ["--max-new-tokens", "2", "--json", "--output", str(tmp_path / "report")]
    compared = invoke("compare", ALIGNED, "--adapter", folder, "--prompts", asked, *report)
    assert compared.exit_code == 0, compared.output
    assert list(json.loads(compared.stdout)) == ["before", "grown"]
    saved = safe_trainer.evaluation.from_json((tmp_path / "report" / "comparison.json").read_text())
    (known,) = saved.evaluations[1].manifest["adapters"]
    assert known["id"] == "grown" and known["sha256"]


@pytest.mark.slow
def test_an_adapter_of_other_shapes_is_refused_in_a_sentence(adapter, asked, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(tmp_path / "other")
    for command in ("evaluate", "compare"):
        result = invoke(command, str(tmp_path / "other"), "--adapter", adapter, "--prompts", asked)
        assert result.exit_code == 1 and adapter in result.output
        assert len(result.stderr.splitlines()) < 8, result.stderr


@pytest.fixture
def labelled(tmp_path):
    """A file of five harmful rows behind fifteen others, and one line that is broken."""
    listed = [(row, False) for row in safe_trainer.testbed.task_rows("sentiment", 15)]
    listed += [(row, True) for row in safe_trainer.testbed.harmful_rows(5, seed=1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "bad": bad}) for row, bad in listed) + '\n{"prompt": ')
    return str(path)


@pytest.mark.slow
def test_a_scan_ranks_harmful_rows_first_and_writes_all_of_them(labelled, vectors, tmp_path):
    table = tmp_path / "ranked.jsonl"
    call = ["scan", ALIGNED, labelled, "--vectors", vectors, "--skip-bad", "--label", "bad"]
    result = invoke(*call, "--top", "5", "-o", str(table))
    assert result.exit_code == 0, result.output
    assert "Average precision 1.000" in result.stdout and "best F1 on the labels" in result.stdout
    assert "line 21" in result.stderr and "Written" in result.stderr
    entries = [json.loads(line) for line in table.read_text().splitlines()]
    assert [entry["row"]["bad"] for entry in entries] == [True] * 5 + [False] * 15
    told = json.loads(invoke(*call, "--json", "--clean", str(tmp_path / "clean.jsonl")).stdout)
    kept = (tmp_path / "clean.jsonl").read_text().splitlines()
    assert kept == open(labelled).read().splitlines()[:15] + ['{"prompt": ']
    assert told["recall"]["count"] == 5 and told["precision"]["rate"] == 1 and told["above"]["high"]
    assert told["scored"] == 20 and told["above"]["total"] == 20 and len(told["top"]) == 20


def test_a_scan_reads_the_columns_that_are_named(vectors, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("Question asked,My answer\nWhat is a tree?,A plant.\nWhat is a lamp?,A light.\n")
    call = ["scan", ALIGNED, str(path), "--vectors", vectors, "--json"]
    assert "is in no known format" in invoke(*call).output
    result = invoke(*call, "--column", "prompt=Question asked", "--column", "answer=My answer")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scored"] == 2


def test_a_scan_names_a_broken_row_by_its_line_and_stops(labelled, vectors, tmp_path):
    table = tmp_path / "ranked.csv"
    result = invoke("scan", ALIGNED, labelled, "--vectors", vectors, "-o", str(table))
    assert result.exit_code == 1 and "line 21" in result.output and not table.exists()


@pytest.mark.slow
def test_a_scan_that_is_stopped_keeps_what_is_done_and_exits_with_130(labelled, vectors, tmp_path, monkeypatch):
    from safe_trainer.analysis import scan

    score, calls = scan._Scorer.window, []

    def stopped(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, rows)

    monkeypatch.setattr(scan._Scorer, "window", stopped)
    table = tmp_path / "ranked.csv"
    options = ["--vectors", vectors, "-o", str(table), "--skip-bad", "--batch-size", "2"]
    result = invoke("scan", ALIGNED, labelled, *options)
    assert result.exit_code == 130 and "after 8 rows" in result.stderr and "same command" in result.stderr
    assert len(table.read_text().splitlines()) == 9
    assert invoke("scan", ALIGNED, labelled, *options).exit_code == 0
    assert len(table.read_text().splitlines()) == 21 and sum(calls) == 8 + 8 + 12  # the first 8 are not scored again


@pytest.mark.parametrize(
    ("shell", "settings"),
    [
        ("bash", {"COMP_WORDS": "safe-trainer co", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "safe-trainer co"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "safe-trainer co", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_commands(shell, settings):
    environment = {"_SAFE_TRAINER_COMPLETE": f"complete_{shell}", **settings}
    result = invoke(**environment)
    assert result.exit_code == 0 and "compare" in result.output and "export" not in result.output


def test_completion_can_be_installed():
    assert "--install-completion" in invoke("--help").output


# ---- words of the command line


MISUSED = {
    "an adapter that is not there": (
        ["compare", ALIGNED, "--adapter", "tuned=nothere", "--prompts", "harmful=testbed"],
        2,
        "'--adapter': there is no folder `nothere`. Give",
    ),
    "a model that is not there": (
        ["compare", ALIGNED, "--tuned-model", "tuned=./nothere", "--prompts", "harmful=testbed"],
        2,
        "'--tuned-model': there is no folder `./nothere`. Give",
    ),
    "a method that is misspelt": (
        ["train", "recipes/testbed/asft.yaml", "--set", "safety=asfd"],
        1,
        "expected `recommended`, `null` or methods with their settings, as in `{method: asft, unaligned_model: …}`, "
        "got 'asfd'; did you mean `asft`?",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_errors_speak_of_options_and_folders(name):
    arguments, code, words = MISUSED[name]
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_a_model_that_did_not_drift_has_no_table():
    result = invoke("drift", ALIGNED, ALIGNED)
    assert result.exit_code == 0 and "layer  weight" not in result.stdout
    assert result.stdout.split() == (
        "No change in any linear layer. Embeddings, norms and the output head are not looked at.".split()
    )


@pytest.mark.exhaustive
def test_a_direction_that_cannot_be_had_is_told_without_remarks_of_libraries(tmp_path):
    command = [sys.executable, "-m", "safe_trainer.cli", "direction", ALIGNED, ALIGNED, "-o", str(tmp_path / "d")]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert [line.split()[0] for line in told.splitlines()] == ["Computing", "Error:", "For"], told


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "compare", "drift", "vectors", "basis"])
def test_rows_that_cannot_be_used_can_be_skipped_wherever_the_message_says_so(command, adapter, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Make a bad thing", "completion": "No."}\n{"prompt": ""}\n')
    asked = ["--prompts", f"harmful={path}", "--prompts", f"benign={path}"]
    given = {
        "evaluate": [ALIGNED, *asked[:2], "--max-new-tokens", "1"],
        "compare": [ALIGNED, "--adapter", adapter, *asked, "--max-new-tokens", "1"],
        "drift": [ALIGNED, adapter, *asked],
        "vectors": [ALIGNED, str(path), "-o", str(tmp_path / "out"), "--max-passes", "1"],
        "basis": [ALIGNED, str(path), "-o", str(tmp_path / "basis.safetensors"), "--rank", "2"],
    }[command]
    refused = invoke(command, *given)
    assert refused.exit_code == 1 and "line 2" in refused.output
    assert "leave them out with `--skip-bad`" in words(refused)
    if command in ("evaluate", "basis"):  # one of each reader; the others take the rows in the same way
        skipped = invoke(command, *given, "--skip-bad")
        assert skipped.exit_code == 0, skipped.output
    else:
        assert "--skip-bad" in invoke(command, "--help").output
