"""Every block of code in the README does what it says, in one folder from top to bottom.

The models that it names are folders of that name here, with the embedded pair in them; nothing is looked up elsewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safe_trainer import testbed
from safe_trainer.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": testbed.ALIGNED,
    "Qwen/Qwen2.5-0.5B": testbed.UNALIGNED,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a reader who has followed the README: models, a dataset, and files of their own."""
    home = tmp_path_factory.mktemp("home")
    for name, source in MODELS.items():
        shutil.copytree(source, home / name)
    rows = [{"prompt": f"Name the number {n}.", "completion": str(n)} for n in range(6)]
    (home / "trl-lib" / "Capybara").mkdir(parents=True)
    (home / "trl-lib" / "Capybara" / "train.jsonl").write_text("\n".join(map(json.dumps, testbed.benign_rows(4))))
    (home / "mine.csv").write_text("\n".join(["question,answer", *(f"{r['prompt']},{r['completion']}" for r in rows)]))
    (home / "harmful.jsonl").write_text("\n".join(map(json.dumps, testbed.harmful_rows(8))))
    for name, kind in (("asked.csv", "harmful"), ("fine.csv", "benign")):
        (home / name).write_text("\n".join(["prompt", *testbed.prompt_set(kind).prompts[:2]]))
    return home


def lines(block: str) -> list[list[str]]:
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def run_python(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def run_command(words: list[str], home: Path) -> None:
    """Run a command of ours; of those that install, serve or launch, see that what they name is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"]), words
    elif words[0] in ("accelerate", "torchrun") or words[:2] == ["safe-trainer", "app"]:
        named = [word for word in words if word.endswith((".yaml", ".py"))]
        assert all((home / word).exists() or (ROOT / word).exists() for word in named), words
        assert words[0] != "safe-trainer" or CliRunner().invoke(app, [*words[1:2], "--help"]).exit_code == 0
    else:
        assert words[0] == "safe-trainer", f"nobody knows how to try {words}"
        result = CliRunner().invoke(app, words[1:], prog_name="safe-trainer")
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_every_block_of_code_in_the_readme_runs(home, monkeypatch):
    monkeypatch.chdir(home)
    # TRL's default, bfloat16, is refused where there is no GPU, though PyTorch has it on CPUs too.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for language, block in BLOCKS:
        if language == "python":
            run_python(block)
        elif language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block)
            assert name, f"the first line must say which file this is: {block}"
            (home / name[1]).write_text(block)
        else:
            assert language == "bash", f"a block in {language}"
            for words in lines(block):
                run_command(words, home)
    assert (home / "tuned" / "comparison.html").exists() and (home / "out" / "adapter_model.safetensors").exists()


def test_the_readme_has_blocks_of_every_kind_and_links_that_lead_somewhere():
    assert {language for language, _ in BLOCKS} == {"python", "yaml", "bash"}
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    named = re.findall(r"`(recipes/[\w./-]*)`", README)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_stands_in_the_readme():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    told = " ".join(re.findall(r"^\| `safe-trainer [^|]*\|", README, re.MULTILINE))
    missing = {name for name in names if f"`{name}`" not in told and f"safe-trainer {name}" not in told}
    assert not missing
