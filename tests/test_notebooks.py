"""The notebooks: each source runs, and each notebook is what its source says, with outputs and pictures."""

from __future__ import annotations

import ast
import importlib.util
import runpy
from functools import partialmethod
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "notebooks"


def builder():
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = builder()
NAMES = [path.stem for path in BUILD.sources()]
ROOMS = {f"safe_trainer.{room}" for room in ("analysis.drift", "analysis.scan", "data", "evaluation", "methods.base")}


@pytest.fixture
def shortly(monkeypatch):
    """Train for three steps and fit for one pass, whatever a source says: what they come to is in the notebooks."""
    from trl import SFTConfig

    from safe_trainer.artifacts.fitting import Fitting

    prepare = SFTConfig.__post_init__

    def prepare_for_three_steps(self):
        prepare(self)
        self.max_steps = 3

    monkeypatch.setattr(SFTConfig, "__post_init__", prepare_for_three_steps)
    monkeypatch.setattr(Fitting, "__init__", partialmethod(Fitting.__init__, max_passes=1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("shortly")
def test_each_source_runs_on_the_embedded_pair(name, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(FOLDER / f"{name}.py"))
    assert found["REAL_MODEL"] is False


@pytest.mark.parametrize("name", NAMES)
def test_each_notebook_is_its_source_with_outputs(name):
    notebook, source = nbformat.read(FOLDER / f"{name}.ipynb", 4), BUILD.notebook_of(FOLDER / f"{name}.py")
    old = f"run `python recipes/notebooks/build.py {name}`"
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in source.cells], old
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a notebook has a picture of its own"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "Colab" in notebook.cells[0].source and BUILD.MARK not in notebook.cells[0].source
    switch = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert switch.startswith("REAL_MODEL = False  # True: "), "the first cell is the switch to a real model"
    assert max(int(cell.execution_count) for cell in notebook.cells if cell.cell_type == "code") == len(
        [cell for cell in notebook.cells if cell.cell_type == "code"]
    ), "all cells were run once, in their order"


def test_the_notebooks_that_were_promised_are_there_and_small():
    assert set(NAMES) >= {"quickstart", "still_safe", "your_data", "comparing_methods"}
    assert {name for name in NAMES if name.startswith("method_")} >= {
        f"method_{name}" for name in ("asft", "salora", "security_vectors")
    }
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_use_public_names_only(name):
    import safe_trainer

    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert {module for module in modules if module.startswith("safe_trainer.")} <= ROOMS
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == "safe_trainer"]
    assert {alias.name for node in ours for alias in node.names} <= set(safe_trainer.__all__)


def test_colab_opens_the_repository_that_the_project_declares():
    badge = BUILD.colab("quickstart", {"Repository": "https://github.com/someone/safe_trainer/"})
    place = (
        "https://colab.research.google.com/github/someone/safe_trainer/blob/main/recipes/notebooks/quickstart.ipynb"
    )
    assert badge.endswith(f"({place})")
    for urls in ({}, {"Repository": "https://elsewhere.org/safe_trainer"}):
        assert "Upload notebook" in BUILD.colab("quickstart", urls)
