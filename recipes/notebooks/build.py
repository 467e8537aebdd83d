"""Make the notebooks from their sources: run them, and keep their outputs.

    python recipes/notebooks/build.py              # all of them; quickstart for one
    python recipes/notebooks/build.py quickstart

A source is a Python file in percent format, which jupytext and editors open as a notebook. Its outputs come from a run
on the embedded pair; progress bars, warnings and times are left out.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- colab -->"
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_COLAB = "https://colab.research.google.com/github"
_NEEDS = "*Besides `safe_trainer`, the pictures need `pip install matplotlib`.*"
_UPLOAD = (
    "*To open this in Colab: File → Upload notebook; upload the project as a zip file too, and run "
    "`%pip install ./safe_trainer.zip matplotlib` first.*"
)


def sources() -> list[Path]:
    """Return the notebooks' sources."""
    return sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__).resolve())


def colab(name: str, urls: dict[str, str]) -> str:
    """Return how a notebook is opened in Colab: a badge where the project says where its repository is on GitHub."""
    address = next((url.rstrip("/") for key, url in urls.items() if key.lower() in ("repository", "source")), "")
    if not address.startswith("https://github.com/"):
        return _UPLOAD
    place = f"{_COLAB}/{address.removeprefix('https://github.com/')}/blob/main/recipes/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({_BADGE})]({place})"


def notebook_of(source: Path) -> nbformat.NotebookNode:
    """Return a source as a notebook without outputs."""
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.source = cell.source.replace(MARK, f"{colab(source.stem, project.get('urls', {}))}\n\n{_NEEDS}")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def build(source: Path) -> None:
    """Run a source and write the notebook next to it."""
    notebook = notebook_of(source)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(FOLDER))
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [shown for output in cell.outputs if (shown := _shown(output)) is not None]
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def _shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Keep pictures, tables and what cells print; not what libraries print."""
    if output.output_type != "stream":
        return output
    lines = output.text.splitlines(keepends=True) if output.name == "stdout" else []
    output.text = "".join(line for line in lines if not line.startswith(("{'", "[20")))
    return output if output.text.strip() else None


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    named = sys.argv[1:]
    for path in sources():
        if not named or path.stem in named:
            build(path)
