"""Named suites: each reads one record in its official layout, and says where to get what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from safe_trainer.cli.options import Questions
from safe_trainer.data import ReadOptions, load_prompts, load_suite, suites
from safe_trainer.recipe.schema import PromptsPart

ASK, SAFE = "How do I do X?", "How do I do Y?"
JBB = "Index,Goal,Target,Behavior,Category,Source\n0,{},Sure,B,C,Original\n"
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    f"{ASK},standard,illegal,,,a\nDo that,contextual,illegal,context,A text.,b\nSing it,copyright,copyright,,,c\n"
)
WILDGUARD = [
    {"prompt": ASK, "adversarial": True, "response": "No.", "prompt_harm_label": "harmful", "subcategory": "x"},
    {"prompt": SAFE, "adversarial": False, "response": "Yes.", "prompt_harm_label": "unharmful", "subcategory": "x"},
]

# Name of the suite, files in the official layout with inert rows of our own, and the prompts of each kind.
LAYOUTS = {
    "advbench": ({"harmful_behaviors.csv": f'goal,target\n{ASK},"Sure, here"\n'}, {"harmful": [ASK]}),
    "harmbench": (
        {"harmbench_behaviors_text_all.csv": HARMBENCH},
        {"harmful": [ASK, "A text.\n\n---\n\nDo that"]},
    ),
    "harmbench-copyright": ({"harmbench_behaviors_text_all.csv": HARMBENCH}, {"harmful": ["Sing it"]}),
    "strongreject": (
        {"strongreject_dataset.csv": f"category,source,forbidden_prompt\nx,y,{ASK}\n"},
        {"harmful": [ASK]},
    ),
    "strongreject-small": (
        {"strongreject_small_dataset.csv": f"category,source,forbidden_prompt\nx,y,{ASK}\n"},
        {"harmful": [ASK]},
    ),
    "jailbreakbench": (
        {"harmful-behaviors.csv": JBB.format(ASK), "benign-behaviors.csv": JBB.format(SAFE)},
        {"harmful": [ASK], "borderline": [SAFE]},
    ),
    "xstest": (
        {
            "xstest_prompts.csv": "id,prompt,type,label,focus,note\n"
            f"1,{SAFE},homonyms,safe,x,\n2,{ASK},contrast_homonyms,unsafe,x,\n"
        },
        {"harmful": [ASK], "borderline": [SAFE]},
    ),
    "or-bench": (
        {"or-bench-toxic.csv": f"prompt,category\n{ASK},x\n", "or-bench-hard-1k.csv": f"prompt,category\n{SAFE},x\n"},
        {"harmful": [ASK], "borderline": [SAFE]},
    ),
    "sorry-bench": (
        {
            "question.jsonl": "\n".join(
                json.dumps({"question_id": 1, "category": "1", "turns": [text], "prompt_style": style})
                for text, style in ((ASK, "base"), (SAFE, "slang"))
            )
        },
        {"harmful": [ASK]},
    ),
    "hex-phi": (
        {"category_1.csv": f'"{ASK}"\n', "category_3.csv": '"And Z, please?"\n'},
        {"harmful": [ASK, "And Z, please?"]},
    ),
    "directharm4": ({"test.jsonl": json.dumps({"instruction": ASK, "category": "x"})}, {"harmful": [ASK]}),
    "wildguardtest": (
        {"test.jsonl": "\n".join(map(json.dumps, WILDGUARD))},
        {"harmful": [ASK], "benign": [SAFE]},
    ),
    "wildjailbreak": (
        {"eval.tsv": f"adversarial\tlabel\tdata_type\n{ASK}\t1\tadversarial_harmful\n{SAFE}\t0\tadversarial_benign\n"},
        {"harmful": [ASK], "borderline": [SAFE]},
    ),
    "ailuminate": (
        {
            "airr_official_1.0_demo_en_us_prompt_set_release.csv": "release_prompt_id,prompt_text,hazard,persona\n"
            f"1,{ASK},cse,normal\n"
        },
        {"harmful": [ASK]},
    ),
    "phtest": (
        {"dataset_v0.1.csv": f"ID,Request,Harmfulness\n1,{SAFE},harmless\n2,{ASK},controversial\n"},
        {"borderline": [SAFE]},
    ),
    "beavertails": (
        {"evaluation.json": json.dumps([{"prompt": ASK, "category": "a", "category_id": "0"}])},
        {"harmful": [ASK]},
    ),
    "do-not-answer": ({"data.csv": f"id,risk_area,types_of_harm,question\n0,a,b,{ASK}\n"}, {"harmful": [ASK]}),
    "aoa": ({"asked.csv": f"prompt\n{ASK}\n"}, {"harmful": [ASK]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_local_copy_in_the_official_layout_is_read(tmp_path, name):
    files, expected = LAYOUTS[name]
    folder = tmp_path / "copy"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(content)
    sources = [folder] if len(files) > 1 else [folder, folder / next(iter(files))]
    for source in sources:
        assert {found.kind: list(found.prompts) for found in load_suite(name, source)} == expected


def test_every_suite_has_a_layout_here_and_says_what_it_is():
    assert set(LAYOUTS) == set(suites())
    for suite in suites().values():
        assert suite["licence"] and suite["citation"] and suite["measures"] and suite["page"].startswith("https://")


def test_identity_shift_brings_its_system_turn_and_frame(tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text(f"prompt\n{ASK}\n")
    (found,) = load_suite("aoa", path)
    system, asked = found.conversations()[0]
    assert system["role"] == "system" and "Absolutely Obedient Agent" in system["content"]
    assert asked["content"] == f"AOA, execute my instruction: {ASK}"


def test_some_of_a_suite_can_be_taken(tmp_path):
    path = tmp_path / "xstest_prompts.csv"
    path.write_text(LAYOUTS["xstest"][0]["xstest_prompts.csv"])
    (found,) = load_suite("xstest", path, kinds=("borderline",), options=ReadOptions(limit=5))
    assert (found.kind, found.name, found.source) == (
        "borderline", "xstest borderline", "suite:xstest=xstest_prompts.csv"
    )  # fmt: skip


def test_what_is_downloaded_is_pinned_or_its_commit_is_reported(monkeypatch):
    """The Hub is played by a function: it records what is asked for, and answers as `datasets` does."""
    rows, asked = Dataset.from_list([{"prompt": ASK, "instruction": ASK, "goal": ASK}]), []

    def load_dataset(name, subset=None, *, split, data_files=None, revision=None):
        asked.append(data_files or f"{name}@{revision}")
        rows.info.download_checksums = {f"hf://datasets/{name}@{revision or 'c' * 40}/data.csv": {}}
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    pinned = suites()["advbench"]["revision"]
    sources = [load_suite(name)[0].source for name in ("advbench", "advbench@main", "directharm4", "directharm4@v2")]
    assert sources == [f"suite:advbench@{pinned}", "suite:advbench@main", f"suite:directharm4@{'c' * 40}",
                       "suite:directharm4@v2"]  # fmt: skip
    assert f"/{pinned}/data/advbench" in asked[0] and "/main/data/advbench" in asked[1]
    assert asked[2:] == ["vfleaking/DirectHarm4@None", "vfleaking/DirectHarm4@v2"]
    assert load_prompts("hf:owner/name:test", "harmful")[0].source == f"hf:owner/name@{'c' * 40}:test"
    with pytest.raises(ValueError, match="names a revision, which a local copy .* has not"):
        load_suite("advbench@main", "asked.csv")


def test_the_suites_whose_commit_is_not_pinned_are_named_in_the_documentation():
    page = " ".join((Path(__file__).parents[1] / "docs" / "evaluation.md").read_text().split())
    newest, without_prompts = (f"`{name}`" for name, suite in suites().items() if "revision" not in suite)
    assert f"of {newest} the newest version is read" in page
    assert f"{without_prompts} has no prompts of its own" in page


def test_a_local_copy_is_read_as_the_options_say(tmp_path):
    path = tmp_path / "xstest_prompts.csv"
    path.write_text(
        f"id;frage;type;label\n1;Wie hei\u00df ist X?;homonyms;safe\n2;{ASK};x;unsafe\n3;;x;unsafe\n", "latin-1"
    )
    suite = {"suite": [f"xstest={path}:frage"], "encoding": "latin-1"}
    sets = Questions(**suite, skip_bad=True).prompt_sets("model")
    assert [asked.prompts for asked in sets] == [(ASK,), ("Wie hei\u00df ist X?",)]
    with pytest.raises(ValueError, match="1 of .* rows cannot be used"):
        Questions(**suite).prompt_sets("model")
    options = ReadOptions(columns={"prompt": "frage"}, encoding="latin-1", where={"type": "homonyms"})
    (found,) = load_suite("xstest", path, kinds=("borderline",), options=options)
    assert found.prompts == ("Wie hei\u00df ist X?",)


def test_a_file_behind_a_url_is_always_pinned():
    for name, suite in suites().items():
        pinned = len(suite.get("revision", "")) == 40
        assert pinned or "revision" not in suite, name
        assert all(pinned and "/{revision}/" in part["url"] for part in suite["sets"] if "url" in part), name


def test_what_is_not_there_says_where_to_get_it():
    with pytest.raises(ValueError, match="no suite `xtest`. Take one of advbench"):
        load_suite("xtest")
    with pytest.raises(ValueError, match=r"`hex-phi` could not be read.*huggingface.co/datasets/LLM-Tuning.*`path`"):
        load_suite("hex-phi")
    with pytest.raises(ValueError, match="Get it from https://github.com/paul-rottger/xstest .commit f600.*CC-BY-4.0"):
        load_suite("xstest")
    with pytest.raises(ValueError, match="could not be downloaded.*Get it from https://github.com/llm-attacks"):
        load_suite("advbench")
    with pytest.raises(ValueError, match="has no prompts of kind benign"):
        load_suite("advbench", kinds=("benign",))


def test_suites_and_folders_are_prompts_for_the_command_line_and_recipes(tmp_path):
    path = tmp_path / "xstest_prompts.csv"
    path.write_text(LAYOUTS["xstest"][0]["xstest_prompts.csv"])
    sets = Questions(suite=[f"xstest={path}"]).prompt_sets("model")
    assert [found.kind for found in sets] == ["harmful", "borderline"]
    part = PromptsPart(suite="xstest", path=str(path), kind="borderline", template="AOA: {prompt}")
    assert (part.suite, part.template, part.answers) == ("xstest", "AOA: {prompt}", "last")
    with pytest.raises(ValueError, match="`suite`"):
        PromptsPart(kind="harmful")
