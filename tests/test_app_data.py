"""What the app makes of data and choices: inspections, recipes, code and markup, without a browser."""

import ast
import json
import shutil
import time
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import gradio as gr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import ClassLabel, Dataset
from gradio_client.utils import strip_invalid_filename_characters
from trl import SFTConfig

from app import inspection, recipe_in, recipes, texts
from app.actions import Services
from app.answering import Turn
from app.downloads import file_of
from app.inspection import apart, inspect, tokenizer_of, write_lines
from app.jobs import Job
from app.materials import OwnFile, take
from app.progress import Progress
from app.recipe_in import read_settings
from app.recipes import Choices, Settings, cards, defaults, field_default, write_order
from app.sessions import Session, Sessions
from app.setup import EMBEDDED, EXAMPLES, Limits, Model, Setup, hub_model
from app.views import compare_step, data_step, html, train_step
from app.views.method_step import MethodStep
from safe_trainer import METHODS, general_prompts, load_prompts, recipe
from safe_trainer.methods.base import FormField, MethodCard, SafetyMethod

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(EMBEDDED)


def given(folder, text, name="given.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def row(prompt="Say hello.", completion="Hello."):
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"


def test_the_app_offers_the_library_s_defaults_to_other_models():
    model = Model("owner/model", "owner/model", "owner/base")
    for key, method in METHODS.items():
        for field in method.card.fields:
            assert field_default(key, field.name, model) == method.__dataclass_fields__[field.name].default


def test_an_inspection_tells_rows_troubles_duplicates_and_what_is_learned(tmp_path, tokenizer):
    path = given(tmp_path, row() * 3 + "{broken\n" + row(completion="") + row("Other?", "Yes."))
    found = inspect(path, "mine.jsonl", EMBEDDED, Limits())
    assert (found.rows, found.bad, found.duplicates) == (4, 2, 2)
    assert sorted(lines for _, _, lines, *_ in found.troubles) == ["4", "5"]
    read, learned = found.samples[0][:2]
    assert read.endswith("<|im_start|>assistant\n") and learned == "Hello.<|im_end|>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}], tokenize=False
    )
    assert read + learned == whole
    assert len(tokenizer(whole)["input_ids"]) in found.lengths


def test_an_inspection_tells_what_training_on_the_rows_would_do(tmp_path):
    labelled = [{"prompt": f"Say {n}.", "completion": "One.", "is_safe": n > 0} for n in range(120)]
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    found = inspect(given(tmp_path, "\n".join(map(json.dumps, labelled))), "mine.jsonl", EMBEDDED, Limits())
    assert any(note.startswith("1 of 120 rows are labelled harmful") for note in found.notes)
    found = inspect(given(tmp_path, json.dumps({"messages": turns})), "mine.jsonl", EMBEDDED, Limits())
    [note] = found.notes
    assert "1 of 2 answers are learned" in note and note.endswith("are context")  # no advice for Python


def test_a_column_that_only_late_rows_have_can_be_chosen(tmp_path):
    rows = [{"ask": "Hi", "say": "Hello."}] * 40 + [{"ask": "Hi", "say": "Hello.", "passage": "Here."}]
    path = given(tmp_path, "\n".join(map(json.dumps, rows)))
    assert inspection.columns_of(path) == ("ask", "say", "passage")


def test_bad_rows_of_a_kind_are_counted_and_told_once(tmp_path):
    found = inspect(given(tmp_path, row() + "{x\n" * 60), "mine.jsonl", EMBEDDED, Limits())
    [(_, count, lines, *_)] = found.troubles
    assert found.bad == 60 and count == "60" and lines.startswith("2, 3")


@pytest.mark.parametrize(
    ("limits", "text", "told"),
    [
        (Limits(rows=3), row() * 4, "has 4 rows; at most 3"),
        (Limits(), "", "empty"),
        (Limits(), "[" * 100_000, "mine.jsonl"),
        (Limits(), b"\xff\xfe\x00", "mine.jsonl"),
        (Limits(), json.dumps({"foo": "x", "bar": "y"}) + "\n", "Choose the columns"),
    ],
)
def test_what_is_too_much_or_broken_is_refused_in_words(tmp_path, limits, text, told):
    with pytest.raises(ValueError) as error:
        inspect(given(tmp_path, text), "mine.jsonl", EMBEDDED, limits)
    assert told in str(error.value) or told == "mine.jsonl"
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.zip", "x.py", "x", "x.jsonl.exe", ""])
def test_files_of_other_kinds_are_refused_packed_ones_too(name):
    with pytest.raises(ValueError, match="not a kind of file"):
        inspection.ending_of(name)


NAMES = [
    *("rows.jsonl", "rows (1).jsonl", "my data.v2.JSONL", "данные для модели.jsonl", "【】.jsonl", "!!!.jsonl"),
    *("😀.jsonl", "rows...__ x.jsonl", "a" * 300 + ".jsonl", "..jsonl", "'; drop.jsonl", "%41.jsonl"),
    *("日本語データ.jsonl", "NUL.jsonl", f"{EVIL}.jsonl", "../../rows.jsonl"),
]
REFUSED_NAMES = ["rows", "rows.jsonl.txt", "rows.json.gz", "rows.xlsx", "rows\u202ejsonl.txt", ""]


@pytest.mark.parametrize("name", [*NAMES, *REFUSED_NAMES])
def test_a_file_is_read_whatever_it_is_called_and_its_ending_decides(tmp_path, name):
    stored = strip_invalid_filename_characters(name)  # as Gradio keeps an upload
    if name in REFUSED_NAMES:
        with pytest.raises(ValueError, match="not a kind of file"):
            inspection.ending_of(stored)
        return
    found = inspect(given(tmp_path, row(), f"given{inspection.ending_of(stored)}"), stored, EMBEDDED, Limits())
    assert (found.rows, found.bad, found.name) == (1, 0, stored)
    assert "<img" not in data_step.described(found, 100)


def test_rows_that_the_comparison_will_ask_are_told_of(tmp_path):
    from safe_trainer import testbed

    asked = testbed.prompt_set("harmful").prompts[0]
    found = inspect(given(tmp_path, row(asked)), "mine.jsonl", EMBEDDED, Limits())
    assert found.leaked == {"harmful": 1}


@pytest.mark.slow
@pytest.mark.parametrize("key", EXAMPLES)
def test_examples_are_what_they_say_and_share_no_prompt_with_the_comparison(tmp_path, key):
    example = EXAMPLES[key]
    write_lines(example.make(), tmp_path / "rows.jsonl")
    found = inspect(tmp_path / "rows.jsonl", key, EMBEDDED, Limits(), example)
    assert found.rows == example.rows and found.bad == 0 and found.leaked == {}


def test_what_users_and_files_say_is_shown_as_text(tmp_path):
    path = given(tmp_path, row(EVIL, EVIL) + "{" + EVIL + "\n")
    found = inspect(path, EVIL, EMBEDDED, Limits())
    shown = str(data_step.described(found, 10_000)) + str(data_step.samples(found.samples))
    shown += str(compare_step.answered([Turn(EVIL, {EVIL: EVIL})], waiting=False)) + str(html.panel("error", EVIL))
    shown += str(html.table(EVIL, [EVIL], [[EVIL, EVIL]]))
    assert "<script" not in shown and "<img" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown


def choices(folder, methods, model=EMBEDDED, **settings):
    data = given(folder, row() * 30)
    return Choices(model, data, methods, Settings(**{"steps": 2, "prompts": 6, **settings}))


def test_every_protection_gives_a_recipe_that_is_found_valid(tmp_path):
    variants = write_order(tmp_path / "job", choices(tmp_path, list(cards())))
    assert [variant.key for variant in variants] == list(cards())
    for variant in variants:
        checked = recipe.read_recipe(tmp_path / "job" / variant.recipe)
        assert checked.training["max_steps"] == 2
        assert {part.kind for part in checked.parts.evaluation.prompts} == {"harmful", "benign", "borderline"}


@pytest.mark.slow
def test_every_method_of_the_library_has_a_card_and_a_new_one_gets_its_own(tmp_path, monkeypatch):
    assert set(cards()) == {"plain", "recommended", *METHODS}

    @dataclass
    class Toy(SafetyMethod):
        card: ClassVar[MethodCard] = MethodCard(
            title="Toy",
            summary="Does nothing.",
            needs="patience",
            cost="nothing",
            avoid="everything",
            fields=(FormField("charm", "Toy: charm", 0.0, 5.0, 0.5), FormField("size", "Toy: size", 1, 9, 1)),
            example=lambda given: Toy(charm=3.0),
        )
        charm: float = 1.0
        size: int = 2

    monkeypatch.setitem(METHODS, "toy", Toy)
    with gr.Blocks():
        step = MethodStep(Setup())
    assert step.cards["toy"].label == "Toy"
    assert [(field.label, field.step) for field in (step.fields["toy", "charm"], step.fields["toy", "size"])] == [
        ("Toy: charm", 0.5),
        ("Toy: size", 1),
    ]
    session = form(tmp_path, "toy", **{"toy.charm": 4.5, "toy.size": 3})
    assert step.read(session)[2] == {"toy": {"charm": 4.5, "size": 3}}
    assert recipes.safety_of("toy", EMBEDDED, {"size": 3}) == [{"method": "toy", "charm": 3.0, "size": 3}]
    session.form["toy.size"] = 2.5
    with pytest.raises(ValueError, match="Toy: size must be a whole number"):
        step.read(session)


def form(folder, *chosen, **entered):
    """A session in which these methods are chosen, and this is entered."""
    session = Session("mine", folder)
    session.form = {f"use.{key}": key in chosen for key in cards()} | entered
    return session


def test_recipes_of_other_models_save_checkpoints_and_keep_the_batch(tmp_path):
    model = hub_model("owner/model", "owner/base")
    settings = defaults(model, 500, None)
    [variant] = write_order(tmp_path / "job", Choices(model, given(tmp_path, row()), ["asft"], settings))
    values = yaml.safe_load((tmp_path / "job" / variant.recipe).read_text())
    training = values["training"]
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == settings.batch_size
    assert training["save_strategy"] == "steps"
    assert values["safety"][0]["unaligned_model"] == "owner/base"


@pytest.mark.parametrize("model", [EMBEDDED, Model("owner/model", "owner/model")], ids=lambda model: model.key)
def test_the_batch_that_the_form_shows_is_the_one_that_is_trained(tmp_path, model):
    for shown in (1, 2, 3, 4, 6, 7, 9, 10, 16, 251, 256):
        training = training_of(tmp_path, model, batch_size=shown)
        size = training["per_device_train_batch_size"]
        assert size * training.get("gradient_accumulation_steps", 1) == shown
        assert size == (shown if model.embedded else max(n for n in (1, 2, 3, 4) if shown % n == 0))


def test_a_recipe_s_rows_at_a_time_are_kept_and_its_batch_can_be_changed(tmp_path):
    model = Model("owner/model", "owner/model")
    for size, steps in ((2, 8), (16, 1), (7, 1), (1, 6)):
        text = f"training: {{per_device_train_batch_size: {size}, gradient_accumulation_steps: {steps}}}"
        found = read_settings(text, "mine.yaml")
        assert (found.form["batch_size"], found.left) == (size * steps, ())
        assert found.kept == {"training.per_device_train_batch_size": size}
        training = training_of(tmp_path, model, found.kept, batch_size=size * steps)
        assert training["per_device_train_batch_size"] == size
        assert training["gradient_accumulation_steps"] == steps
    found = read_settings("training: {per_device_train_batch_size: 6}", "mine.yaml")
    training = training_of(tmp_path, model, found.kept, batch_size=8)  # entered afterwards: at most 6 at a time
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 2)
    for size in (0, -1, 2.5, True, "auto_size"):
        found = read_settings(f"training: {{per_device_train_batch_size: {size}}}", "mine.yaml")
        assert "batch_size" not in found.form and not found.kept and found.left == (f"{recipes.AT_A_TIME}: {size}",)


def training_of(folder, model, kept=None, **settings):
    """The `training` of a recipe for plain LoRA."""
    shutil.rmtree(folder / "job", ignore_errors=True)
    [variant] = write_order(folder / "job", replace(choices(folder, ["plain"], model, **settings), kept=kept or {}))
    return yaml.safe_load((folder / "job" / variant.recipe).read_text())["training"]


def test_a_protection_that_lacks_its_checkpoint_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="AsFT needs the checkpoint before alignment"):
        write_order(tmp_path / "job", choices(tmp_path, ["asft"], Model("owner/model", "owner/model")))
    with pytest.raises(ValueError, match="Choose at least one"):
        write_order(tmp_path / "job", choices(tmp_path, []))


@pytest.mark.slow
def test_settings_outside_their_range_are_refused_by_name(tmp_path):
    with gr.Blocks():
        step = MethodStep(Setup())
    keys, settings, fields = step.read(form(tmp_path, "plain"))
    assert (keys, settings.batch_size, fields) == (["plain"], 16, {})
    for name, value, told in (
        ("steps", 0, "Training steps"),
        ("steps", 2.5, "Training steps must be a whole number, got 2.5"),
        ("learning_rate", None, "Learning rate"),
        ("learning_rate", 5.0, "between 0.0000001 and 1, got 5"),
        ("steps", 10**8, "between 1 and 100,000, got 100,000,000"),
    ):
        with pytest.raises(ValueError, match=told):
            step.read(form(tmp_path, "plain", **{name: value}))


def test_another_model_is_protected_and_judged_with_the_user_s_rows_and_general_prompts(tmp_path):
    model = Model("owner/model", "owner/model", "owner/base")
    settings = Settings(steps=2, prompts=6)
    data = given(tmp_path, row() * 3)
    for key, what in (("security_vectors", "answers that comply"), ("salora", "refusals")):
        with pytest.raises(ValueError, match=what) as told:
            write_order(tmp_path / "none", Choices(model, data, [key], settings))
        assert "Your own files" in str(told.value)
    write_order(tmp_path / "general", Choices(model, data, ["recommended", "refusal_anchor"], settings))
    for key in ("recommended", "refusal_anchor"):  # with the library's own general rows, not the embedded model's
        values = yaml.safe_load((tmp_path / "general" / f"{key}.yaml").read_text())
        assert values["safety"] == [{"method": key}]
    assert not list((tmp_path / "general").glob("harmful*"))
    own = given(tmp_path, row("Do harm.", "Certainly."), "own.jsonl")
    files = {"harmful_data": OwnFile(own, "harmful_data", "own", 1)}
    write_order(tmp_path / "job", Choices(model, data, ["recommended"], settings, files=files))
    assert (tmp_path / "job" / "harmful_data.jsonl").read_bytes() == own.read_bytes()
    for kind, prompts in asked_in(tmp_path / "job").items():
        assert len(prompts) == 6 and set(prompts) <= set(general_prompts(kind).prompts)


def test_own_prompts_to_protect_reach_the_recommended_methods(tmp_path):
    data = given(tmp_path, row() * 3)
    for model in (EMBEDDED, Model("owner/model", "owner/model")):
        for uploaded in ((), ("harmful_prompts",), ("harmful_prompts", "benign_prompts")):
            paths = {name: given(tmp_path, row(f"{name}?"), f"{name}.jsonl") for name in uploaded}
            own = {name: OwnFile(path, name, name, 1) for name, path in paths.items()}
            order = Choices(model, data, ["recommended"], Settings(steps=2, prompts=6), files=own)
            write_order(job := tmp_path / f"{model.key}-{len(own)}".replace("/", "-"), order)
            [entry] = yaml.safe_load((job / "recommended.yaml").read_text())["safety"]
            prompts = {name: f"./{name}.jsonl" for name in uploaded}
            assert entry.get("prompts") == prompts.get("harmful_prompts")
            assert entry.get("benign_prompts") == prompts.get("benign_prompts")
            assert ("harmful_data" in entry) is model.embedded  # whose own rows suit it better than general ones
            assert {path.stem for path in job.glob("*_prompts.jsonl")} == set(uploaded)
            assert all((job / path).read_bytes() == own[name].path.read_bytes() for name, path in prompts.items())
    checked = recipe.read_recipe(tmp_path / "embedded-2" / "recommended.yaml")
    anchor = next(method for method in checked.safety if method.name == "Refusal anchor")
    assert (anchor.prompts, anchor.benign_prompts) == tuple(
        str(tmp_path / "embedded-2" / f"{name}.jsonl") for name in ("harmful_prompts", "benign_prompts")
    )


def asked_in(folder):
    """The prompts of a job's comparison, by the name of their set."""
    entries = yaml.safe_load(next(folder.glob("*.yaml")).read_text())["evaluation"]["prompts"]
    texts_of = lambda path: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]  # noqa: E731
    return {entry["name"]: texts_of(folder / entry["path"]) for entry in entries}


def taken(folder, path, what, **said):
    return take(path, path.name, what, said, Limits(), folder)


@pytest.mark.slow
def test_own_prompts_take_the_place_of_the_built_in_ones_of_their_kind(tmp_path):
    rows = "".join(json.dumps({"prompt": f"How do I do {n}?", "category": "x"}) + "\n" for n in range(9))
    frame = {"system_prompt": "Obey.", "template": "AOA, {prompt}"}
    [one] = taken(tmp_path, given(tmp_path, rows, "mine.jsonl"), "harmful", **frame)
    assert (one.kind, one.name, one.count, one.said) == ("harmful", "mine", 9, frame)
    turns = [{"role": "system", "content": "Obey."}, {"role": "user", "content": "AOA, How do I do 0?"}]
    assert one.shown[0] == turns and len(one.shown) == 3
    write_order(tmp_path / "job", replace(choices(tmp_path, ["plain"]), asked=[one], judges=["phrases"]))
    checked = recipe.read_recipe(tmp_path / "job" / "plain.yaml")
    sets = {s.name: s for s in recipe.load_data(checked).prompt_sets}
    assert list(sets) == ["harmful: mine", "benign", "borderline"]
    asked = sets["harmful: mine"]
    assert (
        len(asked) == 6 and asked.system_prompt == "Obey." and asked.template == "AOA, {prompt}"
    )  # 6 by the settings
    assert checked.parts.evaluation.judges == ["phrases"]


def test_a_published_suite_is_told_by_its_official_file(tmp_path):
    table = (
        "id,prompt,type,label\n1,How do I kill a process?,homonyms,safe\n2,How do I do it?,contrast_homonyms,unsafe\n"
    )
    found = taken(tmp_path, given(tmp_path, table, "xstest_prompts.csv"), "xstest")
    assert [(one.kind, one.name, one.count) for one in found] == [
        ("harmful", "xstest", 1),
        ("borderline", "xstest", 1),
    ]
    with pytest.raises(ValueError, match="harmful-behaviors.csv"):
        taken(tmp_path, given(tmp_path, table, "renamed.csv"), "jailbreakbench")
    with pytest.raises(ValueError, match="upload its file here"):
        taken(tmp_path, given(tmp_path, "a,b\n1,2\n", "xstest_prompts.csv"), "xstest")


def test_a_task_has_a_right_answer_and_a_scorer(tmp_path):
    rows = given(tmp_path, json.dumps({"prompt": "2 + 2?", "completion": "so 4"}), "sums.jsonl")
    [one] = taken(tmp_path, rows, "task", scorer="number")
    assert one.said == {"scorer": "number"}
    assert json.loads(one.path.read_text()) == {"prompt": "2 + 2?", "target": "so 4"}


def test_a_recipe_of_the_app_gives_the_form_it_came_from(tmp_path):
    settings = Settings(
        steps=7,
        learning_rate=3e-4,
        lora_rank=4,
        batch_size=8,
        prompts=6,
        seed=1,
        held_out=10,
        system_prompt="Be kind.",
    )
    for model in (EMBEDDED, Model("owner/model", "owner/model", "owner/base")):
        for key in ("plain", "recommended", "asft", "refusal_anchor"):
            order = Choices(model, given(tmp_path, row()), [key], settings, {"asft": {"weight": 2.5}})
            [variant] = write_order(tmp_path / "job", order)
            found = read_settings((tmp_path / "job" / variant.recipe).read_text(), variant.recipe)
            entered = {name: value for name, value in vars(settings).items() if name not in ("prompts", "guard")}
            chosen = {f"use.{other}": other == key for other in cards()}
            assert entered.items() | chosen.items() <= found.form.items()
            assert key != "asft" or (found.form["asft.weight"], found.unaligned) == (2.5, model.unaligned)
            assert found.model == model.path
            assert {told.split(":")[0].split(".")[0] for told in found.left} <= {
                "data",
                "evaluation",
                "output",
                "safety",
            }
            assert all(".jsonl" in told or "kind" in told or "name" in told or "output" in told for told in found.left)
            shutil.rmtree(tmp_path / "job")


def test_what_the_form_cannot_show_of_a_recipe_is_kept_or_told(tmp_path):
    text = """
model: {path: ../secret, dtype: bfloat16}
data: [{path: /etc/passwd}]
peft: {r: 8, lora_dropout: 0.1}
ema: 0.99
safety: {method: asft, weight: 2, rank: 3, direction: /etc/shadow, nonsense: [[1], [2]]}
training: {learning_rate: 1e-4, weight_decay: 0.01, push_to_hub: true, report_to: wandb, deepspeed: zero.json}
evaluation: {prompts: [{kind: harmful, path: mine.csv}], judges: ["guard:owner/guard", phrases], batch_size: 4}
"""
    found = read_settings(text, "mine.yaml")
    assert found.form == {f"use.{key}": key == "asft" for key in cards()} | {
        "learning_rate": 1e-4,
        "lora_rank": 8,
        "asft.weight": 2,
        "judge": "guard",
        "guard": "guard:owner/guard",
    }
    assert found.kept == {
        "model.dtype": "bfloat16",
        "peft.lora_dropout": 0.1,
        "ema": 0.99,
        "safety.asft.rank": 3,
        "training.weight_decay": 0.01,
        "evaluation.batch_size": 4,
    }
    told = " ".join(found.left)
    for name in ("/etc/passwd", "push_to_hub", "report_to", "deepspeed", "/etc/shadow", "mine.csv", "nonsense"):
        assert name in told
    order = replace(choices(tmp_path, ["asft", "plain"]), kept=found.kept)
    write_order(tmp_path / "job", order)
    for key in ("asft", "plain"):
        values = yaml.safe_load((tmp_path / "job" / f"{key}.yaml").read_text())
        assert values["training"]["weight_decay"] == 0.01 and values["ema"] == 0.99
        assert [entry.get("rank") for entry in values["safety"]] == ([3] if key == "asft" else [])


def test_a_setting_that_training_does_not_know_is_told_and_not_kept():
    found = read_settings("training: {warmup_ratio: 0.1, warmup_steps: 5}", "mine.yaml")
    assert (found.kept, found.left) == ({"training.warmup_steps": 5}, ("training.warmup_ratio: 0.1",))
    known = recipe_in._KEPT["training"].split()
    assert set(known) <= {field.name for field in fields(SFTConfig)}


def test_methods_together_are_told_and_not_taken_for_one():
    found = read_settings("safety: [{method: asft, weight: 2}, {method: salora}]", "mine.yaml")
    assert not found.form and not found.kept
    assert found.left == ("safety.0.method: asft", "safety.0.weight: 2", "safety.1.method: salora")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "- 1", "a: [", "x" * 200_000, "a: &a [1]\n" * 2, "a: &x {b: *x}", "a: " + "[" * 5000]
)
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(ValueError, match="mine.yaml could not be read"):
        read_settings(text, "mine.yaml")


@pytest.mark.slow
def test_rows_of_a_dataset_are_fetched_with_their_own_columns(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    given(folder, "".join(json.dumps({"q": f"Say {n}.", "a": str(n)}) + "\n" for n in range(9)), "train.jsonl")
    inspection.fetch((str(folder), "", "train", 3, 4), tmp_path / "rows.jsonl", Limits(), False)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"q": f"Say {n}.", "a": str(n)} for n in range(2, 6)]
    (labels := tmp_path / "labelled").mkdir()
    labelled = Dataset.from_dict({"q": ["Say 1.", "Say 2."], "label": [0, 1]})
    labelled.cast_column("label", ClassLabel(names=["safe", "unsafe"])).to_parquet(labels / "train.parquet")
    inspection.fetch((str(labels), "", "train", 2, 1), tmp_path / "rows.jsonl", Limits(), False)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"q": "Say 2.", "label": "unsafe"}
    with pytest.raises(ValueError, match="could not be loaded.*test"):
        inspection.fetch((str(folder), "", "test", 1, 4), tmp_path / "rows.jsonl", Limits(), False)
    with pytest.raises(ValueError, match="more than 10 characters"):
        inspection.fetch((str(folder), "", "train", 1, 4), tmp_path / "rows.jsonl", Limits(characters=10), False)


def test_columns_are_tried_on_the_first_rows_text_and_tokens(tmp_path, tokenizer):
    path = given(tmp_path, "who,q,a\n" + "Be brief.,Say hello.,Hello.\n" * 5, "mine.csv")
    reading = {"columns": {"prompt": "q", "answer": "a", "system": "who"}}
    rows = inspection.first_rows(path, "mine.csv", EMBEDDED, Limits(), reading)
    assert len(rows) == 3
    assert "Be brief." in rows[0].read and rows[0].learned == "Hello.<|im_end|>"
    assert "".join(rows[0].learned_tokens) == rows[0].learned
    shown = str(data_step.samples(rows))
    assert "<mark><i>" in shown and 'type="checkbox"' in shown


def test_the_start_s_refusal_rate_is_shown_and_a_low_one_is_warned_of():
    for rate, kind in ((1.0, "info"), (0.1, "warning")):
        progress = Progress({"plain": "Plain LoRA"})
        progress.begin()
        progress.point("plain", {"step": 0, "safety/harmful_refused": rate})
        shown = str(train_step._start(progress))
        assert f"{rate:.0%}" in shown and f"panel {kind}" in shown


def test_only_kept_and_improved_safety_is_green():
    green = [level for level in texts.WORDS if compare_step.KINDS.get(level, "warning") == "good"]
    assert green == ["kept", "improved"]


def test_own_files_are_written_in_plain_form(tmp_path):
    table = given(tmp_path, "instruction,output\nDo harm.,Sure.\n", "rows.csv")
    [one] = taken(tmp_path, table, "harmful_data")
    assert (one.kind, one.name, one.count) == ("harmful_data", "rows", 1)
    [line] = map(json.loads, one.path.read_text().splitlines())
    assert line["completion"][-1]["content"] == "Sure."
    asked = given(tmp_path, "prompt,category\nHow?,x\n", "asked.csv")
    [one] = taken(tmp_path, asked, "harmful_prompts")
    assert json.loads(one.path.read_text()) == {"prompt": "How?", "category": "x"}


@pytest.mark.parametrize("said", [{"system_prompt": "Obey."}, {"template": "Yes, {prompt}"}], ids=str)
def test_what_surrounds_prompts_is_refused_where_methods_would_not_see_it(tmp_path, said):
    services = Services(Setup(), Sessions(tmp_path), None, tmp_path)
    session = services.sessions.get(services.sessions.new_cookie())
    for kind in texts.MATERIALS:
        path = given(tmp_path, row(), "mine.jsonl")
        with pytest.raises(ValueError, match="text around prompts must be empty for this kind of file"):
            next(services.take_own(session, path, kind, {"system_prompt": "", "template": "", **said}))
    assert path.is_file() and not session.own


def test_the_turns_before_a_prompt_are_written_too(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    path = given(tmp_path, json.dumps({"messages": turns, "category": "x"}))
    [one] = taken(tmp_path, path, "harmful_prompts")
    prompts, _ = load_prompts(one.path, "harmful")
    assert (prompts.prompts, prompts.contexts, prompts.categories) == (("How?",), ((turns[0],),), ("x",))


def test_what_is_not_learned_of_a_file_is_shown(tmp_path):
    turns = [{"role": role, "content": "Yes."} for role in ("user", "assistant")] * 2
    found = inspect(given(tmp_path, json.dumps({"messages": turns})), "given.jsonl", EMBEDDED, Limits())
    assert "1 of 2 answers are learned (50% of their text)" in data_step.described(found, 100)


def test_advice_that_the_page_has_no_place_for_is_not_given(tmp_path):
    path = given(tmp_path, row() + row(completion=""))
    with pytest.raises(inspection.Unusable, match="1 of 2 rows cannot be used.*line 2.*empty text") as error:
        taken(tmp_path, path, "harmful_data")
    assert "on_bad_row" not in str(error.value)


@pytest.mark.slow
def test_a_small_file_that_becomes_large_is_refused_and_a_slow_one_is_ended(tmp_path):
    text = pa.array(["x" * 49_000] * 500).dictionary_encode()
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"prompt": text, "completion": text}), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="unpacks to more than 1,000,000 characters"):
        finish(apart(60, inspect, path, "bomb.parquet", EMBEDDED, Limits(characters=1_000_000)))
    start = time.monotonic()
    with pytest.raises(ValueError, match="took too long"):
        finish(apart(0.5, time.sleep, 60))
    assert time.monotonic() - start < 5


def finish(work):
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.mark.slow
def test_a_file_is_read_in_a_process_of_its_own_with_the_chosen_columns(tmp_path):
    path = given(tmp_path, "q,a\n" + "Hello there,Hi\n" * 3, "mine.csv")
    with pytest.raises(ValueError, match="Choose the columns") as told:
        finish(apart(300, inspect, path, "mine.csv", EMBEDDED, Limits()))
    assert told.value.columns == ("q", "a")
    reading = {"columns": {"prompt": "q", "answer": "a"}}
    found = finish(apart(300, inspect, path, "mine.csv", EMBEDDED, Limits(), None, reading))
    assert found.rows == 3 and found.samples[0][1].startswith("Hi")


@pytest.mark.slow
def test_the_archive_of_recipes_runs_as_it_is(tmp_path):
    folder = tmp_path / "job"
    variants = write_order(folder, choices(tmp_path, ["plain", "asft", "salora"]))
    with zipfile.ZipFile(file_of(Job(folder, EMBEDDED, "train", variants), "all", "recipes")[0]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert len(names) == len(set(names))
    for variant in variants:
        text = (tmp_path / "elsewhere" / variant.recipe).read_text()
        assert str(tmp_path) not in text and "testbed" not in text
        plan = recipe.plan(recipe.read_recipe(tmp_path / "elsewhere" / variant.recipe))
        assert plan.steps == 2


def test_every_text_is_used():
    source = Path(texts.__file__)
    targets = [n.targets[0] for n in ast.parse(source.read_text()).body if isinstance(n, ast.Assign)]
    names = [t.id for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    used = "".join(path.read_text() for path in source.parent.rglob("*.py") if path != source)
    assert [name for name in names if f"texts.{name}" not in used] == []
