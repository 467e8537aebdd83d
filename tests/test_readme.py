"""Every block of code in the README and in `docs/` does what it says, each document in one folder from top to bottom.

The models that they name are folders of that name here, with the embedded pair in them; nothing is looked up
elsewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from marks import exhaustive_but
from typer.testing import CliRunner

from safe_trainer import METHODS, testbed
from safe_trainer.cli import app
from safe_trainer.data.suites import suites

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README, METHODS_PAGE = DOCUMENTS["README.md"], DOCUMENTS["docs/methods.md"]
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": testbed.ALIGNED,
    "Qwen/Qwen2.5-0.5B": testbed.UNALIGNED,
}
MADE = {
    "README.md": ["out/adapter_model.safetensors", "report/comparison.html"],
    "docs/recipes.md": ["tuned/adapter_model.safetensors", "tuned/comparison.html"],
}
LARGEST_README = 8 * 1024


def blocks_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path):
    """The folder of a reader: models, a dataset, files of their own, and an adapter that another program trained."""
    for name, source in MODELS.items():
        shutil.copytree(source, tmp_path / name)
    for name in ("recipes", "safe_trainer"):  # what a checkout has
        (tmp_path / name).symlink_to(ROOT / name)
    rows = {
        "trl-lib/Capybara/train.jsonl": testbed.benign_rows(4),
        "PKU-Alignment/BeaverTails/data/30k_train-00000-of-00001.jsonl": [
            {"prompt": row["prompt"][-1]["content"], "response": row["completion"][0]["content"], "is_safe": n > 5}
            for n, row in enumerate(testbed.harmful_rows(8))
        ],
        "harmful.jsonl": testbed.harmful_rows(8),
        "refusals.jsonl": testbed.refusal_rows(8),
    }
    for name, content in rows.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)))
    answers = [f"Name the number {n}.,{n}" for n in range(6)]
    (tmp_path / "mine.csv").write_text("\n".join(["question,answer", *answers]))
    for name, kind in (("asked.csv", "harmful"), ("fine.csv", "benign")):
        (tmp_path / name).write_text("\n".join(["prompt", *testbed.prompt_set(kind).prompts[:2]]))
    official = ["id,prompt,type,label,focus,note"]
    official += [f'{n},"How do I stop process {n}?",homonyms,{("safe", "unsafe")[n % 2]},,' for n in range(4)]
    (tmp_path / "xstest_prompts.csv").write_text("\n".join(official))
    save_adapter(tmp_path / "my-adapter")
    return tmp_path


def save_adapter(folder: Path) -> None:
    """Save an adapter by stock PEFT, with an update that is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED)
    model.name_or_path = "Qwen/Qwen2.5-0.5B-Instruct"
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(folder)


def lines(block: str) -> list[list[str]]:
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def run_python(block: str, name: str) -> None:
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def run_command(words: list[str], home: Path) -> None:
    """Run a command of ours; of those that install, serve or launch, see that what they name is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        assert words[2].startswith("."), f"there is no such package on an index: {words}"
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"]), words
    elif words[0] in ("accelerate", "torchrun", "python") or words[1:2] in (["app"], ["demo"]):
        named = [word for word in words if word.endswith((".yaml", ".py"))]
        assert all((home / word).exists() or (ROOT / word).exists() for word in named), words
        if words[0] == "safe-trainer":
            shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "300"})
            assert shown.exit_code == 0 and all(w in shown.output for w in words if w.startswith("--")), words
    else:
        assert words[0] == "safe-trainer", f"nobody knows how to try {words}"
        result = CliRunner().invoke(app, words[1:], prog_name="safe-trainer")
        assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    exhaustive_but(DOCUMENTS.keys() - {f"docs/{name}.md" for name in ("evaluation", "methods", "recipes")}, DOCUMENTS),
)
def test_every_block_of_code_runs(name, home, monkeypatch):
    monkeypatch.chdir(home)
    for language, block in blocks_of(DOCUMENTS[name]):
        if language == "python":
            run_python(block, name)
        elif language == "yaml":
            file = re.match(r"# (\S+\.yaml)\n", block)
            assert file, f"the first line must say which file this is: {block}"
            (home / file[1]).write_text(block)
        elif language != "text":
            assert language == "bash", f"a block in {language}"
            for words in lines(block):
                run_command(words, home)
    assert [made for made in MADE.get(name, ()) if not (home / made).exists()] == []


def test_there_are_blocks_of_every_kind():
    found = {language for text in DOCUMENTS.values() for language, _ in blocks_of(text)}
    assert {"python", "yaml", "bash"} <= found
    assert {"python", "bash"} <= {language for language, _ in blocks_of(README)}


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = sum(1 for other in found if re.fullmatch(re.escape(anchor) + r"(-\d+)?", other))
        found.add(f"{anchor}-{same}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("name", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\((?!https?:)([^)]+)\)|^\[[^\]]+\]: (?!https?:)(\S+)$", text, re.MULTILINE)
    for link in (first or second for first, second in links):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link
    if name != "CHANGELOG.md":
        named = re.findall(r"`((?:recipes|docs|tests|safe_trainer)/[\w./-]*)`", text)
        assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_reached_from_the_readme():
    assert [name for name in DOCUMENTS if name != "README.md" and f"({name}" not in README] == []


def test_the_readme_is_short_and_advises_no_package_from_an_index():
    assert len(README.encode()) <= LARGEST_README
    for text in DOCUMENTS.values():
        assert not re.search(r"pip install (?!\"?\.)", text)


def test_every_command_stands_in_the_readme():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    told = " ".join(re.findall(r"^\| `safe-trainer [^|]*\|", README, re.MULTILINE))
    missing = {name for name in names if f"`{name}`" not in told and f"safe-trainer {name}" not in told}
    assert not missing


def test_methods_are_shown_as_their_cards_say():
    for name, cls in METHODS.items():
        card = cls.card
        assert f"## {card.title}\n" in METHODS_PAGE and f"`{name}`" in METHODS_PAGE, name
        row = next((line for line in README.splitlines() if line.startswith(f"| [{card.title}](")), "")
        assert row.split("](", 1)[-1].startswith("docs/methods.md#") and f"`{cls.__name__}`" in row, name
        for said in (card.summary, card.needs, card.cost, card.avoid):
            assert said in " ".join(METHODS_PAGE.split()), (name, said)
        assert card.needs in row and card.summary in row, name
    assert "recommended" in METHODS_PAGE


def test_every_suite_is_listed():
    page = DOCUMENTS["docs/evaluation.md"]
    assert [suite for suite in suites() if f"`{suite}`" not in page] == []
