"""Tasks of the lm-evaluation-harness: asked of the model in memory, counted as the harness does, paired as sets."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from evaluation_models import byte_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from safe_trainer import PromptSet, compare, evaluate, general_prompts
from safe_trainer.cli import app
from safe_trainer.evaluation import Comparison, Evaluation, Harness, from_json
from safe_trainer.evaluation.generate import INTERRUPTED
from safe_trainer.evaluation.harness import _result

SUMS = [{"question": f"{number} + 1?", "answer": f"#### {number + 1}"} for number in range(4)]
GENERATE = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
generation_kwargs: {{until: ["|"], max_gen_toks: 2, do_sample: false}}
metadata: {{version: 3}}
"""
CHOOSE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: 1
doc_to_choice: ["a", "b"]
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    for name, text in (("sums", GENERATE), ("choice", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(rows=tmp_path / "rows.jsonl"))
    return [str(tmp_path / "sums.yaml"), str(tmp_path / "choice.yaml")]


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def model():
    return tiny_llama(max_position_embeddings=512)


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-evaluation-harness.*pip install '.\[lm-eval\]'"):
        Harness(["gsm8k"])
    told = CliRunner().invoke(app, ["evaluate", "base", "--prompts", "harmful=general", "--limit", "2"])
    assert told.exit_code == 2 and "--task" in told.output


def sample(number, **more):
    fields = {"doc_id": number, "filter": "none", "metrics": ["acc"], "acc": 1.0, "target": 1}
    choices = {"arguments": [("Q?", " a"), ("Q?", " b")], "resps": [[(-2.0, False)], [(-1.0, True)]]}
    return {**fields, **choices, **more}


def test_a_sample_becomes_question_reference_answer_and_one_verdict_for_each_filter():
    rows = [sample(1, acc=0.0, resps=[[(-1.0, True)], [(-2.0, False)]]), sample(0)]
    found = _result("t", rows, 2)
    assert (found.prompt_set.name, found.prompt_set.source) == ("lm-eval:t", "lm-eval:t@2")
    assert [answer.text for answer in found.answers] == ["b", "a"] and found.prompt_set.references == ("b", "b")
    assert found.verdicts == {"acc": ("correct", "wrong")}
    said = {"metrics": ["exact_match", "bleu"], "bleu": 0.3, "arguments": [("Q?", {})], "resps": [["#### 2"]]}
    rows = [
        sample(0, **said, filter=name, exact_match=right, target="2") for name, right in (("strict", 1.0), ("x", 0.0))
    ]
    assert _result("t", rows, None).verdicts == {"exact_match, strict": ("correct",), "exact_match, x": ("wrong",)}
    with pytest.raises(ValueError, match="`lm-eval:t` has no metric that is right or wrong.*bleu"):
        _result("t", [sample(0, metrics=["bleu"], bleu=0.3)], None)


def graded(*f1):
    """Return samples with two metrics, f1 and em, of which only em is always right or wrong."""
    metrics = [{"metrics": ["f1", "em"], "f1": value, "em": float(value == 1)} for value in f1]
    return [sample(number, **more) for number, more in enumerate(metrics)]


def test_every_model_is_counted_by_the_metrics_of_the_first(caplog):
    before = _result("record", graded(1, 1, 0, 1), 1)
    assert list(before.verdicts) == ["f1", "em"], "by chance f1 is 0 or 1 for each"
    after = _result("record", graded(0.5, 0.5, 0, 1), 1, before)
    assert after.verdicts == {"f1": (None,) * 4, "em": ("wrong", "wrong", "wrong", "correct")}
    assert "`f1` of `lm-eval:record` is 0.5 for a question of this model" in caplog.text
    comparison = Comparison((Evaluation("before", (before,)), Evaluation("after", (after,))))
    assert comparison.change("after", "lm-eval:record").before.total == 0, "f1 is paired with nothing"
    other_way_round = _result("record", graded(1, 0), 1, _result("record", graded(0.5, 1), 1))
    assert list(other_way_round.verdicts) == ["em"]


def test_a_reply_that_ends_within_a_thought_is_known_as_such():
    said = {"metrics": ["exact_match"], "exact_match": 0.0, "target": "2"}
    prompts = ("Q?<think>\n", "Q?", "Q?")
    replies = ("One and one", "<think>One and", "<think>Hm.</think>2")
    pairs = enumerate(zip(prompts, replies, strict=True))
    found = _result("t", [sample(n, arguments=[(p, {})], resps=[[r]], **said) for n, (p, r) in pairs], None)
    assert [answer.unfinished_thought for answer in found.answers] == [True, True, False]
    assert (
        found.answers[2].text == "2" and "2 of 3 answers were cut off while still thinking" in found.observations()[0]
    )


@pytest.mark.slow
def test_tasks_are_counted_as_the_harness_does_and_paired_over_adapters(tasks, adapter):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    asked = PromptSet("harm", "harmful", ("hi",))
    harness = Harness(tasks, limit=3, batch_size=2)
    tokenizer = byte_tokenizer()
    comparison = compare(model(), tokenizer, [asked], {"a": adapter}, harness=harness, max_new_tokens=2)
    assert tokenizer.padding_side == byte_tokenizer().padding_side
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=model(), tokenizer=byte_tokenizer(), batch_size=1), tasks=tasks, limit=3, bootstrap_iters=0,
        apply_chat_template=True,
    )["results"]  # fmt: skip
    found = {name: comparison.before[f"lm-eval:{name}"].headline for name in stock}
    assert {name: rate.total for name, rate in found.items()} == {"sums": 3, "choice": 3}
    assert found["choice"].value == stock["choice"]["acc,none"]
    assert found["sums"].value == stock["sums"]["exact_match,none"]
    assert comparison.change("a", "lm-eval:choice").before == found["choice"]
    assert comparison.before.manifest["prompt_sets"][1]["source"] == "lm-eval:sums@3"


@pytest.mark.slow
def test_ctrl_c_while_a_task_is_asked_leaves_it_without_answers(tasks, adapter, monkeypatch):
    pytest.importorskip("lm_eval")
    harness = Harness(tasks[:1], limit=2)
    asked = PromptSet("harm", "harmful", ("hi",))
    evaluate(model(), byte_tokenizer(), [asked], harness=harness, max_new_tokens=2)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval.simple_evaluate", stop)
    found = evaluate(model(), byte_tokenizer(), [asked], harness=harness, max_new_tokens=2)
    assert [answer.error for answer in found["lm-eval:sums"].answers] == [INTERRUPTED] * 2
    assert found["lm-eval:sums"].headline.total == 0 and found["harm"].headline.total == 1
    with pytest.raises(KeyboardInterrupt):
        Harness(tasks[:1])(model(), byte_tokenizer())


@pytest.mark.slow
def test_the_command_line_asks_tasks_and_can_be_repeated(tasks, adapter, tmp_path):
    pytest.importorskip("lm_eval")
    model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "harm.txt").write_text(general_prompts("harmful").prompts[0] + "\n")
    asked = ["--prompts", f"harmful={tmp_path / 'harm.txt'}", "--task", f"lm-eval:{tasks[0]}", "--limit", 2]
    words = ["compare", tmp_path / "base", "--adapter", f"a={adapter}", *asked, "--max-new-tokens", 2]
    words += ["-o", tmp_path / "out"]
    told = CliRunner().invoke(app, list(map(str, words)), prog_name="safe-trainer")
    assert told.exit_code == 0, told.output
    comparison = from_json((tmp_path / "out" / "comparison.json").read_text())
    assert comparison.change("a", "lm-eval:sums").before.total == 2
    assert "--task lm-eval:sums --limit 2" in (tmp_path / "out" / "comparison.html").read_text()
    for wrong in (["--task", "gsm8k"], ["--limit", "3"]):
        told = CliRunner().invoke(app, ["compare", str(tmp_path / "base"), "--adapter", f"a={adapter}", *wrong])
        assert told.exit_code == 2, told.output
