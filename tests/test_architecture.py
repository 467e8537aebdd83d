"""The plan of the house, held: who may import whom, how large a room may be, and what no file speaks of.

Each rule is a function from source text to the sentences that say how it is broken, so that every rule is itself tried
on a small source that breaks it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "safe_trainer"
STANDARD = {"__future__", *sys.stdlib_module_names}
LIMIT_FILE, LIMIT_FUNCTION = 250, 50

STOPS = {
    "adapters",
    "artifacts",
    "calibration",
    "card",
    "checkpoints",
    "cli",
    "data",
    "direction",
    "drift",
    "evaluation",
    "factors",
    "integrity",
    "landscape",
    "layout",
    "methods",
    "pictures",
    "recipe",
    "recommendation",
    "resuming",
    "saved_adapters",
    "scan",
    "stopping",
    "strategy",
    "subspace",
    "testbed",
    "trainer",
    "vectors",
}

# What a module may import of ours; a module that is not named here is free but for the general rules below.
OURS = {
    "subspace": set(),
    "adapters": set(),
    "methods.*": {"subspace", "adapters", "factors", "calibration", "direction", "vectors"}
    | {"methods.base", "methods.checking", "strategy"},
    "trainer": {"methods.base", "recommendation", "strategy", "checkpoints", "resuming", "stopping", "layout"},
    "stopping": set(),
    "layout": set(),
}
# What it may import besides the standard library and ours.
THEIRS = {"subspace": {"torch"}, "adapters": {"torch", "peft", "transformers"}}  # transformers for GPT-2's Conv1D


def is_within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def imports_of(module: str, source: str, is_package: bool = False) -> set[str]:
    """Return every dotted name that the source imports, wherever in the file, with relative ones made absolute."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def rule_for(stop: str, rules: dict[str, set[str]]) -> set[str] | None:
    for pattern, allowed in rules.items():
        if stop == pattern or (pattern.endswith(".*") and stop.startswith(pattern[:-1])):
            return allowed
    return None


def broken_import_rules(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return one sentence for each import of `module` that the plan of the house does not allow."""
    stop = module.removeprefix("safe_trainer").lstrip(".")
    imported = imports_of(module, source, is_package)
    ours = {name.removeprefix("safe_trainer.") for name in imported if is_within(name, "safe_trainer")}
    theirs = {name for name in imported if name.split(".")[0] not in STANDARD | {"safe_trainer"}}
    broken = []

    allowed = rule_for(stop, OURS)
    if allowed is not None:
        # `from ..subspace import outside` yields both `subspace` and `subspace.outside`; packages on the way are free.
        strangers = {name for name in ours if not any(is_within(name, a) or is_within(a, name) for a in allowed)}
        broken += [f"{module} may not import {name}" for name in sorted(strangers - {"safe_trainer"})]
    allowed = rule_for(stop, THEIRS)
    if allowed is not None:
        broken += [f"{module} may not import {name}" for name in sorted(theirs) if name.split(".")[0] not in allowed]

    def forbid(names: set[str], target: str) -> None:
        broken.extend(f"{module} may not import {name}" for name in sorted(names) if is_within(name, target))

    if stop.startswith("methods"):
        forbid(theirs, "trl")
    if stop.startswith("evaluation"):
        forbid(ours, "trainer")
    if stop and not is_within(stop, "testbed") and not is_within(stop, "cli"):
        forbid(ours, "testbed")
    if stop != "adapters":
        forbid(theirs, "peft.tuners")
    if not is_within(stop, "cli"):
        forbid(theirs, "gradio")
    forbid(theirs, "app")
    return broken


def broken_app_rules(name: str, source: str) -> list[str]:
    """Return one sentence for each import by the app of something that is not a public name of ours."""
    public = {"safe_trainer", *(f"safe_trainer.{name}" for name in importlib.import_module("safe_trainer").__all__)}
    imported = {i for i in imports_of(name, source) if is_within(i, "safe_trainer")}
    return [f"{name} may not import {i}: it is not a public name" for i in sorted(imported - public)]


def broken_size_rules(name: str, source: str) -> list[str]:
    """Return one sentence if the file is too long, and one for each function that does not fit a screen."""
    lines = source.splitlines()
    broken = [f"{name} has {len(lines)} lines, more than {LIMIT_FILE}: two rooms?"] if len(lines) > LIMIT_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1:2] if ast.get_docstring(node) is not None else node.body[:1]
            body = lines[first[0].lineno - 1 : node.end_lineno] if first else []
            count = sum(1 for line in body if line.strip() and not line.strip().startswith("#"))
            if count > LIMIT_FUNCTION:
                broken.append(f"{name}: {node.name} has {count} lines of code, more than {LIMIT_FUNCTION}")
    return broken


# Written in pieces, so that this file does not break its own rule.
UNSPEAKABLE = {
    "a path of one machine": re.compile(r"(?<![\w.~$}])/(?:" + "work|farm|root|opt|mnt)/"),
    "a package registry": re.compile(
        "|".join(["pypi" + r"\.org", "python" + "hosted", r"download\.py" + "torch", "npm" + "js"])
        + "|"
        + "|".join(["--index" + "-url", "--extra-index" + "-url", "--find" + "-links"])
    ),
}


def unspeakable(name: str, text: str) -> list[str]:
    """Return one sentence for each thing in `text` that is no part of the product."""
    return [f"{name} names {what}: {m.group()}" for what, rule in UNSPEAKABLE.items() if (m := rule.search(text))]


def module_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def product_texts() -> list[Path]:
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".html", ".css", ".js", ".json", ".ipynb"}
    folders = [folder for folder in (PACKAGE, ROOT / "app", ROOT / "recipes", ROOT / "tests") if folder.exists()]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    files += [path for path in ROOT.iterdir() if path.suffix in suffixes or path.name == "Makefile"]
    return sorted([*files, *(ROOT / ".ci").iterdir()])


def test_modules_import_only_what_the_plan_allows():
    broken = []
    for path in module_files(PACKAGE):
        broken += broken_import_rules(module_name(path), path.read_text(), path.name == "__init__.py")
    assert not broken, "\n".join(broken)


def test_app_uses_public_names_only():
    broken = [b for path in module_files(ROOT / "app") for b in broken_app_rules(path.name, path.read_text())]
    assert not broken, "\n".join(broken)


def test_files_and_functions_fit_their_room():
    files = [*module_files(PACKAGE), *module_files(ROOT / "app")]
    broken = [b for path in files for b in broken_size_rules(str(path.relative_to(ROOT)), path.read_text())]
    assert not broken, "\n".join(broken)


def test_each_top_level_module_is_a_stop_of_the_way():
    entries = (path for path in PACKAGE.iterdir() if path.name not in {"__pycache__", "__init__.py", "py.typed"})
    strangers = {path.stem for path in entries} - STOPS
    assert not strangers, f"{strangers} stand outside the plan of the house: add them to it, or move them in"


def test_each_method_has_a_file_a_test_file_and_a_recipe_of_its_own():
    methods = pytest.importorskip("safe_trainer.methods").METHODS
    homes = {name: cls.__module__.removeprefix("safe_trainer.methods.") for name, cls in methods.items()}
    assert len(set(homes.values())) == len(homes), f"two methods share a file: {homes}"
    missing = [home for home in homes.values() if not (ROOT / "tests" / f"test_{home}.py").exists()]
    assert not missing, f"no tests/test_<name>.py for {missing}"
    missing = [name for name in methods if not (ROOT / "recipes" / "testbed" / f"{name}.yaml").exists()]
    assert not missing, f"no recipes/testbed/<name>.yaml for {missing}"


def test_no_file_speaks_of_one_machine_or_of_a_registry():
    broken = [b for path in product_texts() for b in unspeakable(str(path.relative_to(ROOT)), path.read_text())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("safe_trainer.subspace", "import peft"),
        ("safe_trainer.subspace", "from safe_trainer.data import poison"),
        ("safe_trainer.adapters", "def f():\n    import trl"),
        ("safe_trainer.methods.asft", "from trl import SFTTrainer"),
        ("safe_trainer.methods.asft", "from .salora import SaLoRA"),
        ("safe_trainer.methods.asft", "from safe_trainer.methods import salora"),
        ("safe_trainer.trainer", "from .calibration import AlignmentDirection"),
        ("safe_trainer.evaluation.comparison", "from ..trainer import SafeSFTTrainer"),
        ("safe_trainer.recipe", "import safe_trainer.testbed"),
        ("safe_trainer.calibration", "from peft.tuners.lora import LoraLayer"),
        ("safe_trainer.data", "import gradio as gr"),
        ("safe_trainer.cli", "from app import main"),
    ],
)
def test_import_rules_catch_what_breaks_them(module, source):
    assert broken_import_rules(module, source)


def test_import_rules_allow_what_the_plan_allows():
    method = "import torch\nfrom ..subspace import outside\nfrom .base import SafetyMethod\nfrom .. import adapters"
    assert broken_import_rules("safe_trainer.methods.asft", method) == []
    command = "def app():\n    import gradio\n    from .testbed import demo"
    assert broken_import_rules("safe_trainer.cli", command) == []


def test_app_rule_catches_what_is_not_public():
    assert broken_app_rules("app.py", "from safe_trainer import PromptSet") == []
    assert broken_app_rules("app.py", "from safe_trainer.data import PromptSet")
    assert broken_app_rules("app.py", "from safe_trainer import _HOMES")


def test_size_rules_catch_long_files_and_functions():
    assert broken_size_rules("a.py", "x = 1\n" * 251)
    assert broken_size_rules("a.py", "def f():\n" + "    x = 1\n" * 51)
    documented = 'def f():\n    """' + "Why.\n" * 60 + '    """\n' + "    x = 1\n    # because\n" * 50
    assert broken_size_rules("a.py", documented) == []


def test_unspeakable_catches_paths_and_registries():
    assert unspeakable("a.py", "open('/" + "work/x')") and unspeakable("a.md", "https://pypi" + ".org/simple")
    assert unspeakable("a.md", "see https://huggingface.co/home and ./work/x") == []
