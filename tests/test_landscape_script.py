"""The landscape script: weights that come back, and numbers that are the evaluation's."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from safe_trainer import PromptSet, evaluate
from safe_trainer.evaluation import LikelihoodJudge
from safe_trainer.lora.updates import linear_layers, weight

SCRIPT = Path(__file__).parents[1] / "recipes/analysis/landscape.py"
HARMFUL = PromptSet("harmful", "harmful", ("do harm", "harm them all", "more harm"))
TASK = PromptSet("sums", "task", ("1 + 1", "2 + 2"), references=("2", "4"))


def task_loss(model, tokenizer):
    """Return the mean loss over the answers' tokens, from one forward pass for each."""
    total, count = 0.0, 0
    for prompt, reference in zip(TASK.prompts, TASK.references, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}]
        head = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        ids, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, head))
        labels = torch.tensor([[-100] * len(start) + ids[len(start) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        total, count = total + float(loss) * (len(ids) - len(start)), count + len(ids) - len(start)
    return total / count


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("landscape", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(tmp_path):
    return [str(path) for path in tiny.save_pair(tmp_path)]


def directions(model) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{name: torch.randn(layer.shape) for name, layer in linear_layers(model).items()} for _ in range(2)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_move_by_both_axes_and_come_back_to_the_last_bit_after_an_error(script, architecture):
    model = tiny.model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    starts = {name: weight(layer.outer).clone() for name, layer in linear_layers(model).items()}
    D, R = script.axes(model, *directions(model))
    with pytest.raises(RuntimeError, match="full disk"), script.moving(model) as move:
        for alpha, beta in ((0.7, 0.1), (-0.3, 0.0)):
            move((alpha, D), (beta, R))
            for name, layer in linear_layers(model).items():
                assert torch.allclose(weight(layer.outer), starts[name] + alpha * D[name] + beta * R[name], atol=1e-5)
        raise RuntimeError("full disk")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_axes_are_orthogonal_and_as_long_as_the_weights_and_coordinates_those_of_least_squares(script):
    model = tiny.model()
    D, R = script.axes(model, *directions(model))
    for name, layer in linear_layers(model).items():
        size = weight(layer.outer).norm().item()
        assert D[name].norm().item() == pytest.approx(size, rel=1e-5)
        assert R[name].norm().item() == pytest.approx(size, rel=1e-5)
        assert abs((D[name] * R[name]).sum().item()) < 1e-5 * size**2
    torch.manual_seed(2)
    change = {name: 0.3 * D[name] - 0.1 * R[name] + 0.01 * torch.randn(d.shape) for name, d in D.items()}
    flat = [torch.cat([axis[name].flatten() for name in D]).double() for axis in (D, R, change)]
    solution = torch.linalg.lstsq(torch.stack(flat[:2], 1), flat[2][:, None]).solution.flatten()
    share = (torch.stack(flat[:2], 1) @ solution).square().sum() / flat[2].square().sum()
    assert script.coordinates(D, R, change) == pytest.approx([*solution.tolist(), share.item()], rel=1e-4)
    with pytest.raises(ValueError, match="no plane"):
        script.axes(model, D, D)


@pytest.mark.slow
def test_the_origin_has_the_evaluations_numbers_and_a_stopped_run_continues(script, pair, tmp_path, monkeypatch):
    aligned, unaligned = pair
    model = AutoModelForCausalLM.from_pretrained(aligned)
    options = ["--model", aligned, "--unaligned", unaligned, "--points", "3", "--output", str(tmp_path / "out")]
    args = script.parse(options)
    probe = script.Probe(model, tiny.tokenizer(), HARMFUL, TASK)
    asked = script.Probe.at

    def failing(self, *place):
        if len((tmp_path / "out/landscape.csv").read_text().splitlines()) == 5:
            raise KeyboardInterrupt
        return asked(self, *place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Probe, "at", failing)
        script.measure(args, probe)
    with (tmp_path / "out/landscape.csv").open("a") as file:
        file.write("0.25,0.")  # and was killed while it wrote
    places, way, alphas, betas = script.measure(args, probe)
    assert len(list(csv.reader((tmp_path / "out/landscape.csv").open()))) == len(places) + 1 == 14
    assert alphas == betas == [-0.5, -0.25, 0.0, 0.25, 0.5] and [place.name for place in way] == ["unaligned"]
    assert way[0].alpha < 0 and way[0].beta == pytest.approx(0, abs=1e-4)
    origin = next(place for place in places if place.alpha == place.beta == 0)
    expected = evaluate(model, tiny.tokenizer(), [HARMFUL], judges=[LikelihoodJudge()], max_new_tokens=1)["harmful"]
    assert origin.refused == expected.outcomes.count("refused")
    assert origin.complied == expected.outcomes.count("complied")
    assert origin.loss == pytest.approx(task_loss(model, tiny.tokenizer()), abs=1e-5)
    assert len(script.draw(places, way, alphas, betas, "Safety").data) == 14
    with pytest.raises(ValueError, match="other settings"):
        script.measure(script.parse([*options, "--seed", "1"]), probe)


def test_checkpoints_of_a_run_are_found_in_order_and_placed(script, pair, tmp_path):
    aligned, unaligned = pair
    model = AutoModelForCausalLM.from_pretrained(aligned)
    d = {name: -change for name, change in script.update(aligned, unaligned).items()}
    for step, alpha in ((20, 0.2), (100, 0.5)):
        with script.moving(model) as move:
            move((alpha, d))
            model.save_pretrained(tmp_path / f"run/checkpoint-{step}")
    (tmp_path / "run/checkpoint-7").mkdir()  # cut off before anything was in it
    assert [name for name, _ in script.checkpoints(tmp_path / "run")] == ["step 20", "step 100"]
    change = script.update(aligned, tmp_path / "run/checkpoint-20")
    assert all(torch.allclose(change[name], 0.2 * d[name], atol=1e-5) for name in d)
    with pytest.raises(FileNotFoundError, match="no adapter"):
        script.checkpoints(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_script_finds_the_embedded_pairs_basin_and_draws_it(script, tmp_path, monkeypatch):
    from plotly.graph_objects import Figure

    from safe_trainer import testbed

    monkeypatch.setattr(Figure, "write_image", lambda *given: None)  # needs a browser
    script.main(["--model", str(testbed.ALIGNED), "--unaligned", str(testbed.UNALIGNED), "--points", "3",
                 "--count", "12", "--span", "0.25", "--output", str(tmp_path)])  # fmt: skip
    places = {
        (float(a), float(b)): int(refused)
        for a, b, refused, *_, name, _ in csv.reader((tmp_path / "landscape.csv").open())
        if not name
    }
    assert places[0.0, 0.0] >= 11 and places[-0.25, 0.0] <= 1 and places[0.0, 0.25] >= 11
    assert "Plotly" in (tmp_path / "landscape.html").read_text()
