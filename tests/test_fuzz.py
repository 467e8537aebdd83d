"""Files of ours that were damaged or made up: refused in words, never half read, never a way to run code.

Every damage is made at random places, always the same ones. What comes of it is either a refusal that names the file,
or, where the damage fell on nothing that counts, exactly what was saved.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import tiny
import torch
from peft import get_peft_model
from runs import lora
from safetensors.torch import load_file, save_file

from safe_trainer import AlignmentDirection, Comparison, PromptSet, SafetyBasis, TrainedVectors
from safe_trainer.analysis.drift import adapter_factors
from safe_trainer.data import conversation
from safe_trainer.evaluation import Evaluation, from_json, to_json
from safe_trainer.evaluation.compare import active_adapter as wearing
from safe_trainer.evaluation.generate import Answer
from safe_trainer.evaluation.results import SetResult
from safe_trainer.lora.io import compact_adapter

ROOT = Path(__file__).resolve().parents[1]
REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(4)]
FLIPS = 120


def compared() -> Comparison:
    asked = PromptSet("mine", "harmful", ("Make a bad thing.", "Make another."))
    answers = tuple(Answer(text) for text in ("I will not do that.", "Sure: a bad thing."))
    results = [
        SetResult(asked, answers, {"phrases": verdicts}) for verdicts in (("refused",) * 2, ("refused", "complied"))
    ]
    return Comparison(
        tuple(Evaluation(name, (result,)) for name, result in zip(("before", "tuned"), results, strict=True))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Save one of each kind; return by kind the file that is damaged, and how it is read."""
    folder = tmp_path_factory.mktemp("saved")
    pair = tiny.save_pair(folder)
    model = tiny.model()
    direction = AlignmentDirection.from_checkpoints(*pair, modules="q_proj|v_proj", rank=2)
    basis = SafetyBasis.from_rows(
        model, tiny.tokenizer(), REFUSED, rank=2, modules=["model.layers.0.self_attn.q_proj"]
    )
    vectors = planted.vectors(model).save(folder / "vectors") / "adapter_model.safetensors"
    comparison = folder / "comparison.json"
    comparison.write_text(to_json(compared()))
    return {
        "direction": (direction.save(folder / "d.safetensors"), AlignmentDirection.load),
        "basis": (basis.save(folder / "b.safetensors"), SafetyBasis.load),
        "vectors": (vectors, lambda path: TrainedVectors.load(path.parent)),
        "comparison": (comparison, lambda path: from_json(path.read_bytes())),
    }


TENSORS = ("direction", "basis", "vectors")
KINDS = (*TENSORS, "comparison")


@pytest.fixture
def damaged(saved, tmp_path) -> Callable[[str], tuple[Path, Callable[[], Any], Any]]:
    """Return for a kind a copy to damage, how to read that, and what was saved."""

    def copy(kind: str) -> tuple[Path, Callable[[], Any], Any]:
        original, load = saved[kind]
        folder = tmp_path / kind
        if kind == "vectors":
            shutil.copytree(original.parent, folder, dirs_exist_ok=True)
        folder.mkdir(exist_ok=True)
        path = Path(shutil.copy(original, folder))
        return path, lambda: load(path), load(original)

    return copy


def alike(one: Any, other: Any) -> bool:
    """Compare two of a kind bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Comparison):
        return one == other
    return alike(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


def refused_or_unharmed(load: Callable[[], Any], path: Path, expected: Any) -> bool:
    """Read; return whether that was refused. Another exception, or another result, is a failure."""
    try:
        found = load()
    except ValueError as error:
        words = str(error)
        assert path.name in words or str(path.parent) in words or "comparison" in words or "JSON" in words, words
        assert len(words) > 40
        return True
    assert alike(found, expected)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(kind, damaged):
    path, load, expected = damaged(kind)
    whole, chance = path.read_bytes(), random.Random(f"bits of {kind}")
    layout = 8 + int.from_bytes(whole[:8], "little") if kind in TENSORS else len(whole)
    refused = 0
    for turn in range(FLIPS):
        content = bytearray(whole)
        # Half of them in the header, which is small beside the tensors.
        position = chance.randrange(layout if turn % 2 else len(whole))
        content[position] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        refused += refused_or_unharmed(load, path, expected)
    assert refused > 0.9 * FLIPS


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_anywhere_is_refused(kind, damaged):
    path, load, expected = damaged(kind)
    whole, chance = path.read_bytes(), random.Random(f"lengths of {kind}")
    for length in [0, 1, 7, 8, 9, len(whole) - 2, *(chance.randrange(len(whole)) for _ in range(25))]:
        path.write_bytes(whole[:length])
        assert refused_or_unharmed(load, path, expected), length


def test_vectors_without_their_weights_are_refused(damaged):
    path, load, _ = damaged("vectors")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="vectors"):
        load()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_in_place_of_a_file_is_refused(kind, damaged):
    path, load, expected = damaged(kind)
    chance = random.Random(f"noise for {kind}")
    for length in (1, 8, 64, 1000):
        path.write_bytes(chance.randbytes(length))
        assert refused_or_unharmed(load, path, expected)


def games(header: dict[str, Any]) -> dict[str, Any]:
    """Return headers that play with the format, by what they do."""
    first, second = [name for name in header if name != "__metadata__"][:2]
    metadata, entry = header["__metadata__"], header[first]
    end = entry["data_offsets"][1]
    return {
        "offsets behind the end": header | {first: entry | {"data_offsets": [0, end + 10**9]}},
        "offsets that are negative": header | {first: entry | {"data_offsets": [-8, end]}},
        "offsets that run backwards": header | {first: entry | {"data_offsets": [end, 0]}},
        "two tensors in one place": header | {second: entry},
        "tensors swapped": header | {first: header[second], second: entry},
        "a shape that is larger": header | {first: entry | {"shape": [10**6, 10**6]}},
        "a shape that is negative": header | {first: entry | {"shape": [-1, -4]}},
        "a shape in another order": header | {first: entry | {"shape": entry["shape"][::-1]}},
        "another type": header | {first: entry | {"dtype": "F16"}},
        "a type that there is not": header | {first: entry | {"dtype": "object"}},
        "a tensor less": {name: value for name, value in header.items() if name != first},
        "no metadata": {name: value for name, value in header.items() if name != "__metadata__"},
        "metadata of numbers": header | {"__metadata__": {"kind": 3}},
        "details that are a list": header | {"__metadata__": metadata | {"details": "[]"}},
        "details that are nested": header | {"__metadata__": metadata | {"details": "[" * 5000 + "]" * 5000}},
        "details of something else": header | {"__metadata__": metadata | {"details": '{"modules": {"a": 1}}'}},
        "a list": [header],
        "nothing": {},
    }


@pytest.mark.parametrize("kind", TENSORS)
def test_a_header_that_plays_games_is_refused(kind, damaged):
    path, load, expected = damaged(kind)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for game, header in games(json.loads(whole[8 : 8 + length])).items():
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + whole[8 + length :])
        refused = refused_or_unharmed(load, path, expected)
        assert refused or (game == "a shape in another order" and header == json.loads(whole[8 : 8 + length])), game
    for length in (0, 2**63, 10**8):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        assert refused_or_unharmed(load, path, expected)


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_another_file_under_these_names_are_refused(kind, damaged):
    from safetensors import safe_open

    path, load, expected = damaged(kind)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    pairs = [(a, b) for a in tensors for b in tensors if a < b and tensors[a].shape == tensors[b].shape][:3]
    changes = [{first: tensors[second].clone(), second: tensors[first].clone()} for first, second in pairs] + [
        {name: tensor[:1].clone()} for name, tensor in list(tensors.items())[:2] if len(tensor) > 1
    ]
    changes += [{name: tensor.double()} for name, tensor in list(tensors.items())[:1]]
    assert changes
    for change in changes:
        save_file(tensors | change, path, metadata=metadata)
        assert refused_or_unharmed(load, path, expected)
    save_file(tensors, path, metadata=metadata)  # written by another program, but the same
    assert not refused_or_unharmed(load, path, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(kind, damaged, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path, load, expected = damaged(kind)
    for save in (lambda: torch.save(Trap(), path), lambda: torch.save({"a": Trap()}, path)):
        save()
        assert refused_or_unharmed(load, path, expected)
    assert not (tmp_path / "sprung").exists()


def test_a_comparison_whose_parts_do_not_fit_is_refused():
    content = json.loads(to_json(compared()))
    for change in (
        {"evaluations": []},
        {"evaluations": [{}]},
        {"prompt_sets": {}},
        {"format": 99},
        {"seed": "many"},
        {"notes": 3},
        {"evaluations": content["evaluations"][::-1]},
    ):
        with pytest.raises(ValueError, match="damaged|format"):
            from_json(json.dumps(content | change))


# ---- adapters, which carry no hash: any other program may have written them


def read_for_drift(folder: Path) -> dict[str, torch.Tensor]:
    return {name: left @ right for name, (left, right) in adapter_factors(folder).items()}


def compacted(folder: Path) -> dict[str, torch.Tensor]:
    compact_adapter(folder, folder / "compact")
    return read_for_drift(folder / "compact")


def worn(folder: Path) -> dict[str, torch.Tensor]:
    with wearing(tiny.model(), folder) as model:
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        updates = {name: layer.get_delta_weight("examined").detach() for name, layer in layers.items()}
    return {name.removeprefix("base_model.model."): update for name, update in updates.items()}


READERS = {"drift": read_for_drift, "compacting": compacted, "comparing": worn}


def rewritten(change: Callable[[dict[str, torch.Tensor], str, str], Any]) -> Callable[[Path], None]:
    """Return a damage that changes the tensors, given with the names of the two factors of one layer."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        A = next(name for name in tensors if "lora_A" in name)
        change(tensors, A, A.replace("lora_A", "lora_B"))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
        )

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no settings": lambda folder: (folder / "adapter_config.json").unlink(),
    "settings cut short": lambda folder: os.truncate(folder / "adapter_config.json", 99),
    "settings that are a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "settings of nothing": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "weights cut short": lambda folder: os.truncate(folder / "adapter_model.safetensors", 3000),
    "noise": lambda folder: (folder / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(999)),
    "no tensors": rewritten(lambda tensors, A, B: tensors.clear()),
    "no A": rewritten(lambda tensors, A, B: tensors.pop(A)),
    "no B": rewritten(lambda tensors, A, B: tensors.pop(B)),
    "A of another layer": rewritten(lambda tensors, A, B: tensors.update({A.replace("s.0", "s.7"): tensors.pop(A)})),
    "B of a smaller rank": rewritten(lambda tensors, A, B: tensors.update({B: tensors[B][:, :2]})),
    "both of a smaller rank": rewritten(
        lambda tensors, A, B: tensors.update({B: tensors[B][:, :2], A: tensors[A][:2]})
    ),
    "flat": rewritten(lambda tensors, A, B: tensors.update({A: tensors[A].flatten()})),
    "NaN": rewritten(lambda tensors, A, B: tensors[A][0].fill_(float("nan"))),
    "integers": rewritten(lambda tensors, A, B: tensors.update({B: tensors[B].int()})),
}


@pytest.fixture
def adapter(tmp_path) -> Path:
    """Return a folder that holds an adapter and nothing else."""
    folder = tmp_path / "an-adapter"
    get_peft_model(tiny.model(), lora(r=3)).save_pretrained(folder)  # a rank that is none of the model's sizes
    rewritten(lambda tensors, A, B: [tensor.normal_() for tensor in tensors.values()])(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_adapter_is_refused_by_name_whatever_it_is_read_for(reader, damage, adapter):
    READERS[reader](adapter)
    DAMAGES[damage](adapter)
    with pytest.raises((ValueError, FileNotFoundError), match="an-adapter") as raised:
        READERS[reader](adapter)
    assert len(str(raised.value)) > 60


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_in_the_layout_of_an_adapter_is_refused_or_changes_nothing(reader, adapter):
    """Among its values, a flipped bit makes another adapter, of which nothing tells that it was not meant."""
    read, path, chance = READERS[reader], adapter / "adapter_model.safetensors", random.Random("adapter")
    expected, whole = read(adapter), path.read_bytes()
    refused = 0
    for _ in range(FLIPS // 3):
        content = bytearray(whole)
        content[chance.randrange(8 + int.from_bytes(whole[:8], "little"))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        refused += refused_or_unharmed(lambda: read(adapter), path, expected)
    assert refused > 0.8 * FLIPS // 3


# ---- what the package never does


UNSAFE = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "yaml.full_load", "yaml.unsafe_load"}
# Which values an argument may have, by the end of the name of what is called; `None` if it may be left out.
ALLOWED = {
    ("torch.load", "weights_only"): {"True"},
    ("yaml.load", "Loader"): {"_Loader", "yaml.SafeLoader"},
    ("load", "allow_pickle"): {None, "False"},
    ("", "trust_remote_code"): {None, "False"},
    ("", "shell"): {None, "False"},
}


def dangers(source: str) -> list[str]:
    """Return what in a source could run code that comes with a file or from the Hub."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".") for alias in node.names}
            found += [name for name in names - {"pickle.UnpicklingError"} if name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [name] if name in FORBIDDEN else []
            found += [
                f"{name}({argument}={given.get(argument)})"
                for (end, argument), allowed in ALLOWED.items()
                if name.endswith(end) and given.get(argument) not in allowed
            ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["safe_trainer", "app", "recipes"])
def test_nothing_reads_pickles_or_runs_what_others_have_written(folder):
    found = {
        str(path.relative_to(ROOT)): what
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (what := dangers(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert dangers(source)
    assert not dangers("torch.load(path, weights_only=True); yaml.safe_load(text); model.eval()")
