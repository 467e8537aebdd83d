"""What the app makes of data and choices: inspections, recipes, code and markup, without a browser."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from app import charts, inspection, texts
from app.catalogue import EMBEDDED, EXAMPLES, PROTECTIONS, Model, Strengths, hub_model
from app.inspection import inspect, tokenizer_of, write_example
from app.limits import Limits
from app.orders import Choices, Settings, defaults, python_code, write_order
from app.views import compare_step, data_step, html, method_step
from safe_trainer import METHODS, recipe

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


def test_the_app_offers_the_library_s_defaults_to_start_from():
    offered = {"asft": "weight", "salora": "rank", "security_vectors": "strength", "drift_penalty": "weight"}
    assert Strengths(*(getattr(METHODS[method], name) for method, name in offered.items())) == Strengths()


def test_an_inspection_tells_rows_troubles_duplicates_and_what_is_learned(tmp_path, tokenizer):
    path = given(tmp_path, row() * 3 + "{broken\n" + row(completion="") + row("Other?", "Yes."))
    found = inspect(path, "mine.jsonl", tokenizer, Limits())
    assert (found.rows, found.bad, found.duplicates) == (4, 2, 2)
    assert [line for line, *_ in found.troubles] == [4, 5]
    read, learned = found.samples[0]
    assert read.endswith("<|im_start|>assistant\n") and learned == "Hello.<|im_end|>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}], tokenize=False
    )
    assert read + learned == whole
    assert found.lengths[0] == len(tokenizer(whole)["input_ids"])


def test_every_bad_row_of_a_kind_is_kept_and_not_only_the_first_five(tmp_path, tokenizer):
    found = inspect(given(tmp_path, row() + "{x\n" * 60), "mine.jsonl", tokenizer, Limits())
    assert found.bad == len(found.troubles) == 60


@pytest.mark.parametrize(
    ("limits", "text", "told"),
    [
        (Limits(rows=3), row() * 4, "More than 3 rows"),
        (Limits(characters=50), row(completion="x" * 60), "Row 1 has 70 characters"),
        (Limits(columns=3), json.dumps(dict.fromkeys("abcd", "x")) + "\n", "has 4 columns"),
        (Limits(), "", "empty"),
        (Limits(), "[" * 100_000, "mine.jsonl"),
        (Limits(), b"\xff\xfe\x00", "mine.jsonl"),
        (Limits(), json.dumps({"foo": 1}) + "\n", "no known format"),
    ],
)
def test_what_is_too_much_or_broken_is_refused_in_words(tmp_path, tokenizer, limits, text, told):
    with pytest.raises(ValueError) as error:
        inspect(given(tmp_path, text), "mine.jsonl", tokenizer, limits)
    assert told in str(error.value) or told == "mine.jsonl"
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.zip", "x.py", "x", "x.jsonl.exe", ""])
def test_files_of_other_kinds_are_refused_packed_ones_too(name):
    with pytest.raises(ValueError, match="no JSON, JSON Lines"):
        inspection.ending_of(name)


def test_rows_that_the_comparison_will_ask_are_told_of(tmp_path, tokenizer):
    from safe_trainer import testbed

    asked = testbed.prompt_set("harmful").prompts[0]
    found = inspect(given(tmp_path, row(asked)), "mine.jsonl", tokenizer, Limits())
    assert found.leaked == {"harmful": 1}


@pytest.mark.parametrize("key", EXAMPLES)
def test_examples_are_what_they_say_and_share_no_prompt_with_the_comparison(tmp_path, tokenizer, key):
    example = EXAMPLES[key]
    found = inspect(write_example(tmp_path, example), key, tokenizer, Limits(), example)
    assert found.rows == example.rows and found.bad == 0 and found.leaked == {}


def test_what_users_and_files_say_is_shown_as_text(tmp_path, tokenizer):
    path = given(tmp_path, row(EVIL, EVIL) + "{" + EVIL + "\n")
    shown = str(data_step.described(inspect(path, EVIL, tokenizer, Limits()), 10_000))
    shown += str(compare_step.answered({EVIL: EVIL}, waiting=False)) + str(html.panel("error", EVIL))
    shown += str(html.table(EVIL, [EVIL], [[EVIL, EVIL]]))
    shown += str(charts.lines(EVIL, [charts.Line(EVIL, 0, [(0, 1)])], 1))
    assert "<script" not in shown and "<img" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown


def choices(folder, protections, model=EMBEDDED, **settings):
    data = given(folder, row() * 30)
    return Choices(model, data, protections, Settings(**{"steps": 2, "prompts": 6, **settings}))


def test_every_protection_gives_a_recipe_that_is_found_valid(tmp_path):
    variants = write_order(tmp_path / "job", choices(tmp_path, list(PROTECTIONS)))
    assert [variant.key for variant in variants] == list(PROTECTIONS)
    for variant in variants:
        checked = recipe.read_recipe(tmp_path / "job" / variant.recipe)
        assert checked.training["max_steps"] == 2
        assert {part.kind for part in checked.parts.evaluation.prompts} == {"harmful", "benign", "borderline"}


def test_every_method_of_the_library_stands_on_a_card(tmp_path):
    offered = set()
    for protection in PROTECTIONS.values():
        offered |= {entry["method"] for entry in protection.safety(EMBEDDED, Settings().strengths)}
    assert offered == {*METHODS, "recommended"}
    assert set(texts.CARDS) == set(PROTECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["plain", "asft", "recommended"])
def test_the_code_that_is_shown_trains_the_same_weights_as_the_recipe(tmp_path, monkeypatch, key):
    from safetensors.torch import load_file

    [variant] = write_order(tmp_path / "job", choices(tmp_path, [key]))
    code = python_code(tmp_path / "job", variant)
    monkeypatch.chdir(tmp_path / "job")
    checked = recipe.read_recipe(f"{key}.yaml")
    trainer = recipe.make_trainer(checked, recipe.load(checked).rows, show_bars=False)
    trainer.train()
    trainer.save_model("of-recipe")
    exec(compile(code, "shown", "exec"), {})
    expected, found = (load_file(Path(name, "adapter_model.safetensors")) for name in ("of-recipe", key))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_recipes_of_other_models_save_checkpoints_and_keep_the_batch(tmp_path):
    model = hub_model("owner/model", "owner/base")
    settings = defaults(model, 500, None)
    [variant] = write_order(tmp_path / "job", Choices(model, given(tmp_path, row()), ["asft"], settings))
    values = yaml.safe_load((tmp_path / "job" / variant.recipe).read_text())
    training = values["training"]
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == settings.batch_size
    assert training["save_strategy"] == "steps"
    assert values["safety"][0]["unaligned_model"] == "owner/base"


def test_a_protection_that_lacks_its_checkpoint_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="AsFT needs the checkpoint before alignment"):
        write_order(tmp_path / "job", choices(tmp_path, ["asft"], Model("owner/model", "owner/model")))
    with pytest.raises(ValueError, match="Choose at least one"):
        write_order(tmp_path / "job", choices(tmp_path, []))


def test_settings_outside_their_range_are_refused_by_name():
    fine = [True] + [False] * (len(PROTECTIONS) - 1) + [125, 2e-3, 8, 16, 128, 42, 100, 40, 1.0, 32, 1.0, 10.0]
    keys, settings = method_step.read(fine)
    assert keys == ["plain"] and settings.steps == 125 and settings.strengths.salora_rank == 32
    for place, value, told in ((0, 0, "Training steps"), (1, None, "Learning rate"), (1, 5.0, "between 1e-07 and 1")):
        wrong = list(fine)
        wrong[len(PROTECTIONS) + place] = value
        with pytest.raises(ValueError, match=told):
            method_step.read(wrong)


def test_curves_lie_where_their_numbers_say():
    drawn = str(charts.lines("Loss", [charts.Line("plain", 0, [(0, 1.0), (50, 0.5), (100, 0.0)])], 100))
    [points] = re.findall(r'points="([^"]+)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT) and x1 == pytest.approx((x0 + x2) / 2)
    assert (y0, y2) == (charts.TOP, charts.HEIGHT - charts.BOTTOM) and y1 == pytest.approx((y0 + y2) / 2)


def test_every_text_is_used():
    source = Path(texts.__file__)
    targets = [n.targets[0] for n in ast.parse(source.read_text()).body if isinstance(n, ast.Assign)]
    names = [t.id for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    used = "".join(path.read_text() for path in source.parent.rglob("*.py") if path != source)
    assert [name for name in names if f"texts.{name}" not in used] == []
