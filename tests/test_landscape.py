"""The landscape against dense arithmetic: axes, moves that leave no trace, coordinates, and a record that resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from safe_trainer import AlignmentDirection, PromptSet, testbed
from safe_trainer.analysis.drift import Factors
from safe_trainer.analysis.landscape import Landscape, Place, axes, draw, measure_landscape, moving, write_landscape
from safe_trainer.analysis.landscape.axes import alignment, random_direction
from safe_trainer.analysis.landscape.exploring import _steps
from safe_trainer.analysis.landscape.record import PLACES
from safe_trainer.analysis.landscape.way import stops_of
from safe_trainer.analysis.pictures import LIGHT
from safe_trainer.lora.updates import linear_layers, weight

HARMFUL = PromptSet("harmful", "harmful", ("do harm", "harm them all", "more harm"))
TASK = PromptSet("sums", "task", ("1 + 1", "2 + 2"), references=("2", "4"))
Q = "model.layers.0.self_attn.q_proj"


class Judge:
    """Judges by the first weight of a layer, counts how often it is asked, and fails when it is told to."""

    name, version = "counting", "1"

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked, self.fails_at = 0, fails_at

    def bound(self, model, tokenizer, decoding):
        def verdicts(prompts, answers):
            self.asked += 1
            if self.asked == self.fails_at:
                raise KeyboardInterrupt
            return ["refused" if weight(linear_layers(model)[Q].outer)[0, 0] > 0 else "complied"] * len(prompts)

        verdicts.name = self.name
        return verdicts


def dense(factors: Factors) -> torch.Tensor:
    return (factors.left if factors.right is None else factors.left @ factors.right).double()


def factored(shape: tuple[int, int], seed: int, rank: int = 3) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator))


def directions(model: torch.nn.Module, dense_along: bool, dense_across: bool) -> tuple[dict, dict]:
    shapes = {name: layer.shape for name, layer in linear_layers(model).items()}
    along = {name: factored(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    across = {name: factored(shape, 100 + i) for i, (name, shape) in enumerate(shapes.items())}
    if dense_along:
        along = {name: Factors(dense(factors).float()) for name, factors in along.items()}
    if dense_across:
        across = {name: Factors(dense(factors).float()) for name, factors in across.items()}
    return along, across


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("normalize", ["layer", "filter"])
@pytest.mark.parametrize(("dense_along", "dense_across"), [(False, False), (True, False), (False, True), (True, True)])
def test_axes_are_orthogonal_and_as_long_as_the_weights(normalize, dense_along, dense_across):
    model = tiny.model("gpt2" if dense_along else "llama")
    layers = linear_layers(model)
    plane = axes(layers, *directions(model, dense_along, dense_across), normalize)
    for name, layer in layers.items():
        W, D, R = weight(layer.outer).double(), dense(plane.along[name]), dense(plane.across[name])
        if normalize == "layer":
            assert (D.norm() / W.norm()).item() == pytest.approx(1, rel=1e-5)
            assert (R.norm() / W.norm()).item() == pytest.approx(1, rel=1e-5)
            assert abs((D * R).sum().item()) < 1e-5 * D.norm() * R.norm()
        else:
            assert torch.allclose(D.norm(dim=1), W.norm(dim=1), rtol=1e-5)
            assert torch.allclose(R.norm(dim=1), W.norm(dim=1), rtol=1e-5)
            assert (D * R).sum(dim=1).abs().max() < 1e-5 * (D.norm(dim=1) * R.norm(dim=1)).max()


def test_second_axis_spans_with_the_first_what_was_given():
    model = tiny.model()
    along, across = directions(model, False, False)
    plane = axes(linear_layers(model), along, across, "none")
    d, r = dense(along[Q]), dense(across[Q])
    expected = r - (r * d).sum() / (d * d).sum() * d
    assert torch.allclose(dense(plane.across[Q]), expected, atol=1e-5)
    assert plane.along[Q] is along[Q]


def test_a_second_direction_along_the_first_is_refused():
    model = tiny.model()
    along, _ = directions(model, False, False)
    with pytest.raises(ValueError, match="wholly along"):
        axes(linear_layers(model), along, along)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_place_is_the_start_plus_both_axes(architecture):
    model = tiny.model(architecture)
    layers = linear_layers(model)
    plane = axes(layers, *directions(model, False, True))
    starts = {name: weight(layer.outer).double() for name, layer in layers.items()}
    with moving(model, plane.along) as mover:
        for alpha, beta in ((0.3, -0.2), (-1.0, 0.5)):
            mover.to((alpha, plane.along), (beta, plane.across))
            for name, layer in layers.items():
                expected = starts[name] + alpha * dense(plane.along[name]) + beta * dense(plane.across[name])
                assert torch.allclose(weight(layer.outer).double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_last_bit_after_an_exception(dtype):
    model = tiny.model().to(dtype)
    before = bits(model)
    plane = axes(linear_layers(model), *directions(model, False, True))
    with pytest.raises(RuntimeError, match="full disk"), moving(model, plane.along) as mover:
        mover.to((0.7, plane.along), (0.1, plane.across))
        assert not torch.equal(model.state_dict()[f"{Q}.weight"], before[f"{Q}.weight"])
        raise RuntimeError("full disk")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_coordinates_are_those_of_least_squares_over_all_layers():
    model = tiny.model()
    layers = linear_layers(model)
    plane = axes(layers, *directions(model, False, True))
    update = {name: factored(layer.shape, 7 + i) for i, (name, layer) in enumerate(layers.items())}
    update[Q] = Factors(0.4 * dense(plane.along[Q]).float() + dense(update[Q]).float())
    matrix = torch.stack(
        [torch.cat([dense(axis[name]).flatten() for name in layers]) for axis in (plane.along, plane.across)], dim=1
    )
    target = torch.cat([dense(update[name]).flatten() for name in layers])
    solution = torch.linalg.lstsq(matrix, target[:, None]).solution.flatten()
    alpha, beta, share = plane.coordinates(update)
    assert (alpha, beta) == pytest.approx(solution.tolist(), rel=1e-4)
    assert share == pytest.approx(((matrix @ solution).square().sum() / target.square().sum()).item(), rel=1e-4)


def test_alignment_is_the_part_of_the_difference_that_the_direction_holds(tmp_path):
    aligned, unaligned = tiny.save_pair(tmp_path)
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (aligned, unaligned))
    layers = linear_layers(model)
    d = weight(layers[Q].outer) - weight(linear_layers(other)[Q].outer)
    whole = alignment(layers, None, unaligned)
    assert torch.equal(whole[Q].left, d) and set(whole) == set(layers)
    direction = AlignmentDirection.from_checkpoints(aligned, unaligned, modules="q_proj", rank=4, max_error=0)
    part = alignment(layers, direction, None)  # the direction names the unaligned model
    U = torch.linalg.svd(d.double()).U[:, :4]
    assert set(part) == set(direction.modules)
    assert torch.allclose(dense(part[Q]), U @ U.mT @ d.double(), atol=1e-5)


def test_alignment_with_another_unaligned_model_is_refused(tmp_path):
    aligned, unaligned = tiny.save_pair(tmp_path)
    direction = AlignmentDirection.from_checkpoints(aligned, unaligned, modules="q_proj")
    tiny.model(seed=9).save_pretrained(tmp_path / "stranger")
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(aligned))
    with pytest.raises(ValueError, match="not computed from this model"):
        alignment(layers, direction, tmp_path / "stranger")
    with pytest.raises(ValueError, match="are the same"):
        alignment(layers, None, aligned)
    with pytest.raises(ValueError, match="give `direction`"):
        alignment(layers, None, None)


def test_directions_and_updates_that_do_not_fit_are_refused_for_what_they_are(tmp_path):
    tiny.model(hidden=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="does not fit the model"):
        alignment(linear_layers(tiny.model()), None, tmp_path / "wide")
    layers = linear_layers(tiny.model())
    along, _ = directions(tiny.model(), False, False)
    nothing = {name: Factors(0 * left, right) for name, (left, right) in along.items()}
    with pytest.raises(ValueError, match="changes nothing"):
        axes(layers, along, nothing)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    aligned, unaligned = tiny.save_pair(folder)
    return AutoModelForCausalLM.from_pretrained(aligned), tiny.tokenizer(), unaligned


def measured(pair, judge=None, **given):
    model, tokenizer, unaligned = pair
    return measure_landscape(
        model, tokenizer, HARMFUL, **{"unaligned": unaligned, "points": 3, "judge": judge or Judge(), **given}
    )


def test_a_stopped_landscape_goes_on_where_it_was_and_the_model_is_untouched(pair, tmp_path):
    before = bits(pair[0])
    with pytest.raises(KeyboardInterrupt):
        measured(pair, Judge(fails_at=6), output=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair[0].state_dict().items())
    lines = (tmp_path / PLACES).read_text().splitlines()
    assert len(lines) == 1 + 5
    (tmp_path / PLACES).write_text("\n".join(lines) + "\n0.25,0.")  # and was killed while it wrote
    pair[0].config._name_or_path += "/."  # the same model under another path
    judge, calls = Judge(), []
    found = measured(pair, judge, output=tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls[:2] == [(1, 14), (2, 14)]  # the unaligned model first: progress is seen before the grid
    assert len(found.places) == 5 + 5 - 1 + 4  # both axes, then the corners of the plane
    assert judge.asked == 1 + 13 - 5 and calls[-1] == (14, 14)
    again = Judge()
    assert repr(measured(pair, again, output=tmp_path)) == repr(found) and again.asked == 0  # `repr`: NaN is NaN
    assert repr(found) == repr(measured(pair))  # without a file, the same
    measured(pair, again, output=tmp_path, points=5)
    assert again.asked == 25 + 8 - 13  # a finer grid needs what is new alone


def test_another_landscape_in_the_folder_is_refused(pair, tmp_path):
    measured(pair, output=tmp_path)
    with pytest.raises(ValueError, match="holds another landscape: seed"):
        measured(pair, output=tmp_path, seed=1)
    with pytest.raises(ValueError, match="odd number"):
        measured(pair, points=4)
    with pytest.raises(ValueError, match="`span`"):
        measured(pair, span=-1.0)


def test_with_no_normalisation_minus_one_is_the_unaligned_model(pair):
    found = measured(pair, normalize="none", span=1.0, task=TASK)
    unaligned = found.checkpoints[0]
    assert (unaligned.name, unaligned.alpha, unaligned.share) == ("unaligned", -1.0, 1.0)
    there = next(place for place in found.places if (place.alpha, place.beta) == (-1.0, 0.0))
    assert there.loss == pytest.approx(unaligned.loss, abs=1e-5)
    own = next(place for place in found.places if (place.alpha, place.beta) == (0.0, 0.0))
    from safe_trainer.evaluation import perplexity

    assert own.loss == pytest.approx(math.log(perplexity(pair[0], pair[1], TASK).value), abs=1e-5)


def test_checkpoints_of_whole_models_and_adapters_are_found_in_order_and_placed(pair, tmp_path):
    model, tokenizer, _ = pair
    d = alignment(linear_layers(model), None, pair[2])
    for step, alpha in ((20, 0.2), (100, 0.5)):
        with moving(model, d) as mover:
            mover.to((alpha, d))
            model.save_pretrained(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-7").mkdir()  # cut off before anything was in it
    assert [name for name, _ in stops_of(tmp_path)] == ["step 20", "step 100"]
    found = measured(pair, run=tmp_path, across="random", normalize="none")
    assert [place.name for place in found.checkpoints] == ["unaligned", "step 20", "step 100"]
    assert [place.alpha for place in found.checkpoints[1:]] == pytest.approx([0.2, 0.5], abs=1e-4)
    assert [place.share for place in found.checkpoints[1:]] == pytest.approx([1, 1], abs=1e-4)


def test_an_adapter_is_the_second_direction_unless_another_is_named(pair, tmp_path):
    model, _, _ = pair
    wrapped = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    found = measured(pair, run=tmp_path)
    end = found.checkpoints[-1]
    assert end.name == "end" and end.beta > 0 and found.settings["second"] == "run"
    assert found.betas[-1] == pytest.approx(2.5 * end.beta, rel=1e-4)
    assert measured(pair, run=tmp_path, across="random").settings["second"] == "random"
    with pytest.raises(FileNotFoundError, match="no adapter"):
        measured(pair, run=tmp_path.parent)


def example() -> Landscape:
    alphas = (-0.5, 0.0, 0.5)
    places = [Place(a, b, *((9, 1, 0) if a >= 0 else (2, 7, 1)), 1.0 + b) for a in alphas for b in alphas]
    run = (Place(-0.4, 0.0, 0, 10, 0, 1.0, "unaligned", 0.9), Place(0.0, 0.3, 4, 6, 0, 1.0, "<b>", 0.7))
    return Landscape(tuple(places), run, alphas, alphas, {"task": {"name": "sums"}, "second": "random"})


def test_small_spans_keep_their_places_apart():
    assert _steps(2e-6, 3) == pytest.approx([-2e-6, -1e-6, 0, 1e-6, 2e-6], rel=1e-3)
    assert _steps(3e-6, 11)[-1] == pytest.approx(3e-6) and len(set(_steps(3e-6, 11))) == 21
    assert _steps(1 / 3, 3)[-1] == 0.333333


def test_the_picture_says_its_units_and_what_the_marks_are():
    figure = draw(example(), LIGHT, "Safety")
    told = figure.layout.title.subtitle.text
    assert "10 harmful prompts" in told and "own harmful score" in told and "70 %" in told
    assert figure.layout.xaxis.title.text.endswith("‖W‖")
    plain = dataclasses.replace(example(), settings={"normalize": "none"}, checkpoints=())
    plain_figure = draw(plain, LIGHT)
    assert "‖W‖" not in plain_figure.layout.xaxis.title.text
    assert "Marks" not in plain_figure.layout.title.subtitle.text


def test_help_tells_the_defaults():
    from safe_trainer.cli import app

    told = CliRunner().invoke(app, ["landscape", "--help"]).output
    assert "0.5 if left out" in " ".join(told.replace("│", " ").split())


def test_the_basin_ends_where_less_than_half_is_refused():
    assert example().basin("alpha") == (0.0, 0.5)
    assert example().basin("beta") == (-0.5, 0.5)
    lost = dataclasses.replace(example(), places=tuple(Place(a, 0, 1, 9, 0, 1.0) for a in (-1, 0, 1)))
    assert all(math.isnan(end) for end in lost.basin("alpha"))
    assert json.loads(json.dumps(lost.to_dict()))["basin"]["alpha"] == [None, None]


def test_the_page_needs_no_network_and_has_both_themes(tmp_path, monkeypatch):
    import plotly.io

    def without_browser(*given, **settings):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(plotly.io, "write_images", without_browser)
    assert [path.name for path in write_landscape(example(), tmp_path)] == ["landscape.html"]
    page = (tmp_path / "landscape.html").read_text()
    assert "prefers-color-scheme: dark" in page and page.count("Plotly.newPlot(") >= 2
    assert not re.search(r'<(script|link|img|iframe)\b[^>]*(src|href)="http', page) and "#0d1117" in page


@pytest.mark.slow
def test_pictures_are_written_in_both_themes(tmp_path):
    files = write_landscape(example(), tmp_path)
    names = {"landscape.html", "landscape.png", "landscape-dark.png", "landscape.svg", "landscape-dark.svg"}
    assert {path.name for path in files} == names
    assert all(path.stat().st_size > 5_000 for path in files)


@pytest.mark.slow
def test_command_finds_the_embedded_pairs_basin_and_leaves_the_model_alone(tmp_path):
    from safe_trainer.cli import app

    arguments = ["landscape", "--model", str(testbed.ALIGNED), "--unaligned", str(testbed.UNALIGNED), "--points", "3",
                 "--count", "12", "--span", "0.25", "--no-picture", "--json", "-o", str(tmp_path)]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    centre = next(place for place in found["places"] if place["alpha"] == place["beta"] == 0)
    back = next(place for place in found["places"] if place["alpha"] == -0.25 and place["beta"] == 0)
    assert centre["refused"] >= 11 and back["complied"] >= 11 and found["checkpoints"][0]["complied"] >= 11
    assert found["basin"]["beta"] == [-0.5, 0.5]  # random directions of half the weights' size do no harm here


def test_random_directions_repeat_with_their_seed():
    shapes = {"a": (4, 3), "b": (4, 3)}
    one, same, other = (random_direction(shapes, seed) for seed in (0, 0, 1))
    assert torch.equal(one["a"].left, same["a"].left)
    assert not torch.equal(one["a"].left, one["b"].left) and not torch.equal(one["a"].left, other["a"].left)
