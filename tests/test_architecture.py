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
from marks import exhaustive_but

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "safe_trainer"
STANDARD = {"__future__", *sys.stdlib_module_names}
LIMIT_FILE, LIMIT_FUNCTION = 500, 50

# Which rooms a room may import from. The test below checks that this table itself has no circle.
ROOMS = {
    "linalg": set(),
    "distributed": set(),
    "data": set(),
    "lora": {"linalg"},
    "evaluation": {"data", "distributed", "lora"},
    "artifacts": {"data", "distributed", "evaluation", "linalg", "lora"},
    "methods": {"artifacts", "data", "distributed", "evaluation", "linalg", "lora"},
    "checkpoints": {"distributed", "lora", "methods"},
    "trainer": {"checkpoints", "data", "distributed", "lora", "methods"},
    "analysis": {"artifacts", "data", "distributed", "evaluation", "linalg", "lora"},
    "recipe": {"analysis", "artifacts", "checkpoints", "data", "distributed", "evaluation", "lora"}
    | {"methods", "trainer"},
    "testbed": {"analysis", "artifacts", "data", "evaluation", "lora", "methods", "recipe", "trainer"},
    "cli": {"analysis", "artifacts", "data", "distributed", "evaluation", "lora", "methods", "recipe", "testbed"},
}
# Where public names are: what everyone needs, and what one who writes methods, judges or an interface needs besides.
PUBLIC = ["safe_trainer", "safe_trainer.data", "safe_trainer.evaluation", "safe_trainer.methods.base"]
# What a room may import besides the standard library.
LIBRARIES = {"linalg": {"torch"}, "lora": {"huggingface_hub", "torch", "peft", "transformers", "safetensors"}}


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


def room_of(name: str) -> str:
    """Return the room of a dotted name below `safe_trainer`; an empty string for the package itself."""
    return name.removeprefix("safe_trainer").lstrip(".").split(".")[0]


def broken_import_rules(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return one sentence for each import of `module` that the plan does not allow, those in functions included."""
    room = room_of(module)
    imported = imports_of(module, source, is_package)
    ours = {name for name in imported if is_within(name, "safe_trainer")}
    theirs = {name for name in imported if name.split(".")[0] not in STANDARD | {"safe_trainer"}}
    broken = []
    if room in ROOMS:
        strangers = {name for name in ours if room_of(name) in ROOMS and room_of(name) not in ROOMS[room] | {room}}
        broken += [f"{module} may not import {name}" for name in sorted(strangers)]
    if room in LIBRARIES:
        strangers = {name for name in theirs if name.split(".")[0] not in LIBRARIES[room]}
        broken += [f"{module} may not import {name}" for name in sorted(strangers)]

    def forbid(target: str) -> None:
        broken.extend(f"{module} may not import {name}" for name in sorted(theirs) if is_within(name, target))

    if room == "methods":
        forbid("trl")
        siblings = {"base", "recommended", module.rpartition(".")[2]}
        if module not in ("safe_trainer.methods", "safe_trainer.methods.recommended"):
            inside = {name.split(".")[2] for name in ours if name.startswith("safe_trainer.methods.")}
            files = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
            broken += [f"{module} may not import {name}" for name in sorted((inside & files) - siblings)]
    if room != "lora":
        forbid("peft.tuners")
    if room != "cli":
        forbid("gradio")
    forbid("app")
    return broken


def circles(rooms: dict[str, set[str]]) -> list[str]:
    """Return one sentence for each room that can be reached from itself."""

    def reached(room: str) -> set[str]:
        found: set[str] = set()
        waiting = list(rooms[room])
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += rooms.get(name, ())
        return found

    return [f"{room} imports itself by way of others" for room in rooms if room in reached(room)]


def broken_app_rules(name: str, source: str) -> list[str]:
    """Return one sentence for each import by the app of something that is not a public name of ours."""
    listed = {module: set(importlib.import_module(module).__all__) for module in PUBLIC}
    public = {*PUBLIC, *(f"{module}.{name}" for module, names in listed.items() for name in names)}
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


def broken_loading_rules(module: str, source: str) -> list[str]:
    """Return one sentence for each call that loads a model other than by `lora`, which puts it where TRL would."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [ast.unparse(call) for call in calls if ast.unparse(call).endswith("ForCausalLM.from_pretrained")]
    return [f"{module} may not call {call}: use `load_model`" for call in loads if room_of(module) != "lora"]


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
    folders = [PACKAGE, *(ROOT / name for name in ("app", "docs", "recipes", "tests"))]
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


def test_models_are_loaded_where_trl_would_put_them():
    files = [*module_files(PACKAGE), *module_files(ROOT / "app")]
    broken = [b for path in files for b in broken_loading_rules(module_name(path), path.read_text())]
    assert not broken, "\n".join(broken)


def test_files_and_functions_fit_their_room():
    files = [*module_files(PACKAGE), *module_files(ROOT / "app")]
    broken = [b for path in files for b in broken_size_rules(str(path.relative_to(ROOT)), path.read_text())]
    assert not broken, "\n".join(broken)


def test_each_top_level_module_is_a_room_of_the_plan():
    entries = (path for path in PACKAGE.iterdir() if path.name not in {"__pycache__", "py.typed"})
    strangers = {path.stem for path in entries} - {"__init__", *ROOMS}
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


def test_the_plan_has_no_circle():
    assert not circles(ROOMS)
    assert circles({"a": {"b"}, "b": {"a"}})


def test_contributing_shows_the_plan():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|([^|]*)\|$", text, re.MULTILINE)
    assert {room: set(re.findall(r"\w+", imports)) for room, imports in rows} == ROOMS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("safe_trainer.linalg", "import peft"),
        ("safe_trainer.linalg", "from safe_trainer.data import poison"),
        ("safe_trainer.lora.updates", "def f():\n    import trl"),
        ("safe_trainer.methods.asft", "from trl import SFTTrainer"),
        ("safe_trainer.methods.asft", "from .salora import SaLoRA"),
        ("safe_trainer.methods.asft", "from safe_trainer.methods import salora"),
        ("safe_trainer.trainer", "from .artifacts import AlignmentDirection"),
        ("safe_trainer.evaluation.compare", "def f():\n    from ..trainer import SafeSFTTrainer"),
        ("safe_trainer.evaluation.compare", "from ..analysis import drift"),
        ("safe_trainer.recipe", "import safe_trainer.testbed"),
        ("safe_trainer.artifacts", "from peft.tuners.lora import LoraLayer"),
        ("safe_trainer.data", "import gradio as gr"),
        ("safe_trainer.cli", "from app import main"),
    ],
    ids=range(13),
)
def test_import_rules_catch_what_breaks_them(module, source):
    assert broken_import_rules(module, source)


def test_import_rules_allow_what_the_plan_allows():
    method = "import torch\nfrom ..linalg import outside\nfrom .base import SafetyMethod\nfrom .. import lora"
    assert broken_import_rules("safe_trainer.methods.asft", method) == []
    command = "def app():\n    import gradio\n    from ..testbed import demo"
    assert broken_import_rules("safe_trainer.cli.app", command) == []


def test_app_rule_catches_what_is_not_public():
    assert broken_app_rules("app.py", "from safe_trainer import PromptSet") == []
    assert broken_app_rules("app.py", "from safe_trainer.data import poison") == []
    assert broken_app_rules("app.py", "from safe_trainer.data.rows import poison")
    assert broken_app_rules("app.py", "from safe_trainer import _ABSENT")


def test_loading_rule_catches_a_model_that_is_loaded_elsewhere():
    source = "AutoModelForCausalLM.from_pretrained(path)"
    assert broken_loading_rules("safe_trainer.analysis.scan", source) and broken_loading_rules("app.worker", source)
    assert broken_loading_rules("safe_trainer.lora.loading", source) == []
    assert broken_loading_rules("app.worker", "AutoTokenizer.from_pretrained(path)") == []


def test_size_rules_catch_long_files_and_functions():
    assert broken_size_rules("a.py", "x = 1\n" * 501)
    assert broken_size_rules("a.py", "def f():\n" + "    x = 1\n" * 51)
    documented = 'def f():\n    """' + "Why.\n" * 60 + '    """\n' + "    x = 1\n    # because\n" * 50
    assert broken_size_rules("a.py", documented) == []


def test_unspeakable_catches_paths_and_registries():
    assert unspeakable("a.py", "open('/" + "work/x')") and unspeakable("a.md", "https://pypi" + ".org/simple")
    assert unspeakable("a.md", "see https://huggingface.co/home and ./work/x") == []


# ---- no test is lost between `make test` and CI


def test_ci_runs_every_test():
    recipes = dict(re.findall(r"^(test\S*): \$\(DEVELOPING\)\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert recipes == {
        "test": '$(PYTEST) -m "not exhaustive"',
        "test-all": "$(PYTEST)",
        "test-fast": '$(PYTEST) -m "not slow"',
    }
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test-all"


def test_what_is_exhaustive_is_slow_and_of_a_matrix_all_cases_are_there(request):
    marks = [{mark.name for mark in item.iter_markers()} for item in request.session.items]
    assert all("slow" in names for names in marks if "exhaustive" in names)
    one, two = exhaustive_but([("a", 1)], [("a", 1), ("b", 2)])
    assert (one.values, one.marks) == (("a", 1), ()) and two.values == ("b", 2)
    assert [mark.name for mark in two.marks] == ["exhaustive"]
    with pytest.raises(AssertionError, match="no such cases"):
        exhaustive_but(["c"], ["a", "b"])
