"""Build the folder of the Space: `python -m app.space_folder build/space` (or `make space`)."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

_ROOT_FILES = ("README.md", "requirements.txt", "space.py")


def build(target: Path) -> Path:
    """Write everything that is to be uploaded, and nothing else."""
    app = Path(__file__).resolve().parent
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in _ROOT_FILES:
        shutil.copyfile(app / name, target / name)
    needed = tomllib.loads((app.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    with (target / "requirements.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in needed)
    unwanted = shutil.ignore_patterns("__pycache__", *_ROOT_FILES, "*.png", Path(__file__).name)
    shutil.copytree(app, target / "app", ignore=unwanted)
    shutil.copytree(app.parent / "safe_trainer", target / "safe_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(app.parent / "LICENSE", target / "LICENSE")
    return target


if __name__ == "__main__":
    build(Path(sys.argv[1]))
