"""Adding a method is one file, one entry in `METHODS` and one test file: every place that shows methods has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a process loads torch anew

ROOT = Path(__file__).resolve().parents[1]

TOY = '''
"""Toy: a penalty on the size of an update."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..lora import updates as adapters
from .base import FormField, MethodCard, PenaltyMethod, check_number


@dataclass
class Toy(PenaltyMethod):
    """Adds `λ ‖ΔW‖_F²`.

    Args:
        weight (`float`, *optional*, defaults to `0.5`): `λ`.

    Source: ours.
    """

    name: ClassVar[str] = "Toy"
    tag: ClassVar[str] = "toy"
    card: ClassVar[MethodCard] = MethodCard(
        title="Toy method",
        summary="A penalty on the size of an update.",
        needs="nothing",
        cost="next to nothing",
        avoid="protecting anything",
        fields=(FormField("weight", "Toy: weight", 0.0, 2.0, 0.1),),
        example=lambda given: Toy(),
    )

    weight: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "weight", "Usual is 0.5.")

    def attach(self, model: Any, tokenizer: Any, train_dataset: Any) -> None:
        self._updates = adapters.updates(model, self.name)
        self.covered_layers = list(self._updates)

    def terms(self, model: Any) -> dict[str, Any]:
        factors = {name: update.factors() for name, update in self._updates.items()}
        return {name: (left @ right).square().sum() for name, (left, right) in factors.items()}
'''

USED = """
import json, sys
from app.recipes import cards
from safe_trainer.cli import app
from safe_trainer.recipe.schema import recipe_schema
from safe_trainer.testbed.experiment import variants

card = cards()["toy"]
(method,) = variants()["toy"]()
print(json.dumps({
    "app": [card.title, card.summary, [field.label for field in card.fields]],
    "demo": type(method).__name__,
    "schema": "Toy" in json.dumps(recipe_schema()),
}))
app(["train", sys.argv[1]])
"""


REFUSED = """
import contextlib, sys
from safe_trainer.cli import app

with contextlib.redirect_stderr(sys.stdout):
    for path in sys.argv[1:]:
        try:
            app(["train", path, "--dry-run"])
        except SystemExit as refused:
            assert refused.code == 1, refused.code
        else:
            raise AssertionError(f"{path} is not refused")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """Return a folder with the library and the app, to which one method was added."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "app").symlink_to(ROOT / "app")
    library = folder / "safe_trainer"
    library.mkdir()
    for path in (ROOT / "safe_trainer").iterdir():
        if path.name not in ("methods", "__pycache__"):
            (library / path.name).symlink_to(path)
    methods = library / "methods"
    methods.mkdir()
    for path in (ROOT / "safe_trainer" / "methods").glob("*.py"):
        (methods / path.name).write_text(path.read_text())
    (methods / "toy.py").write_text(TOY)
    table = (methods / "__init__.py").read_text()
    entry = '    "asft": AsFT,\n'
    assert entry in table
    table = table.replace(entry, f'{entry}    "toy": Toy,\n').replace(
        "from .salora", "from .toy import Toy\nfrom .salora"
    )
    (methods / "__init__.py").write_text(table)
    return folder


def run(package: Path, *command: str) -> str:
    paths = {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **paths},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def recipe(package: Path, **settings: object) -> str:
    path = package / "recipe.yaml"
    (package / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Name the number {n}.", "completion": str(n)}) for n in range(8))
    )
    values = {
        "model": {"path": str(ROOT / "safe_trainer" / "testbed" / "models" / "aligned")},
        "data": [{"path": "rows.jsonl"}],
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "safety": [{"method": "toy", **settings}],
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 0.01},
        "output": str(package / "out"),
    }
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.exhaustive
def test_a_recipe_with_the_new_method_is_validated(package):
    unknown, out_of_range = ({"wieght": 1.0}, {"weight": -1.0})
    (package / "unknown.yaml").write_text(Path(recipe(package, **unknown)).read_text())
    (package / "out_of_range.yaml").write_text(Path(recipe(package, **out_of_range)).read_text())
    told = run(package, "-c", REFUSED, "unknown.yaml", "out_of_range.yaml")
    assert re.search("unknown.*wieght|wieght.*weight", told) and "`weight` must be a finite number" in told


@pytest.fixture(scope="module")
def seen(package) -> dict[str, object]:
    """Use the package in one process, since each would load torch anew: see where the method is, and train with it."""
    return json.loads(run(package, "-c", USED, recipe(package, weight=1.0)).splitlines()[0])


def test_app_card_demo_table_and_schema_have_the_new_method(seen):
    assert seen == {
        "app": ["Toy method", "A penalty on the size of an update.", ["Toy: weight"]],
        "demo": "Toy",
        "schema": True,
    }


def test_a_recipe_with_the_new_method_is_run(package, seen):
    assert (package / "out" / "adapter_model.safetensors").is_file()
    assert "Toy" in (package / "out" / "README.md").read_text()
    (state,) = (package / "out").glob("checkpoint-*/trainer_state.json")
    log = json.loads(state.read_text())
    assert any("safety_penalty" in entry for entry in log["log_history"])
    assert log["stateful_callbacks"]["RunFingerprint"]["attributes"]["Toy"] == {"weight": 1.0}
