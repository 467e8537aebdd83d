"""Options that several commands share: models, rows, prompts and judges, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import misused, note, pairs

if TYPE_CHECKING:
    from ..data import PromptSet
    from ..evaluation import Harness

KINDS = ("harmful", "benign", "borderline", "task")
BUILT_IN = ("general", "testbed")

Aligned = Annotated[str, typer.Argument(help="The aligned model: folder or Hub id.")]
NewOutput = Annotated[Path, typer.Option("--output", "-o", help="Where to write; it must not exist yet.")]

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="KIND=SOURCE of prompts to ask; may be given several times. KIND is harmful, benign, borderline or task; "
        "SOURCE is a file, or file:column; a folder with a file for each category; "
        "hf:owner/name@revision/subset:split:column for a dataset on the Hub; suite:NAME for a published suite; "
        "`general` or `testbed` for built-in ones. Left out, all built-in ones that suit the model."
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        help="NAME of a published suite, such as xstest or strongreject, with all its kinds of prompts, NAME@REVISION "
        "for another revision than the pinned one, or NAME=PATH of a local copy (also FILE:COLUMN); may be given "
        "several times.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="Who judges the answers: phrases, likelihood, guard:MODEL for a guard model (folder or Hub id), or "
        "NAME:MODEL to name how it is asked: llama-guard, shieldgemma, wildguard, harmbench or strongreject (a "
        "rubric, for any chat model); classifier:MODEL for a rejection classifier. May be given several times: rates "
        "follow the first, and agreement is shown. [default: phrases, then likelihood]",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="lm-eval:NAME of a task of the lm-evaluation-harness, such as lm-eval:gsm8k, or lm-eval:FILE.yaml; may "
        "be given several times. Needs the extra `lm-eval`.",
    ),
]
TaskLimit = Annotated[int | None, typer.Option("--limit", min=1, help="Ask only the first questions of each --task.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length at which an answer is cut off.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="prompt=NAME or answer=NAME of a column, where the format is not recognized."),
]
Where = Annotated[
    list[str] | None, typer.Option("--where", help="Take only rows with this value, such as is_safe=false.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Take the first so many rows.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without rows that cannot be used.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of the files of rows, such as latin-1.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a row that are read.")]
SystemPrompt = Annotated[str | None, typer.Option(help="System turn before each prompt.")]
PromptSystem = Annotated[
    list[str] | None, typer.Option(help="NAME=TEXT, a system turn for one prompt set; may be repeated.")
]
PromptTemplate = Annotated[
    list[str] | None, typer.Option(help="NAME=TEXT around each prompt of one set, with {prompt} in it.")
]
PromptScorer = Annotated[
    list[str] | None,
    typer.Option(help="NAME=SCORER for the answers to one task: exact (default), number (the last one) or choice."),
]


def prompt_sets(
    listed: list[str] | None,
    model: str,
    suites: list[str] | None = None,
    systems: list[str] | None = None,
    templates: list[str] | None = None,
    scorers: list[str] | None = None,
    **reading: Any,
) -> list[PromptSet]:
    """Return the prompt sets that `--prompts` and `--suite` name, or those built in for the model."""
    sources = pairs(listed, "--prompts", "harmful=asked.csv")
    unknown = [kind for kind, _ in sources if kind not in KINDS]
    if unknown:
        raise misused("--prompts", f"got the kind {unknown[0]!r}, expected {', '.join(KINDS)}.")
    if not sources and not suites:
        fitting = "testbed" if _is_embedded(model) else "general"
        sources = [(kind, fitting) for kind in KINDS[:3]]
    sets = [_prompt_set(kind, source, reading) for kind, source in sources]
    sets += [prompts for written in suites or () for prompts in _suite(written, reading)]
    settings = [
        ("--prompt-system", "system_prompt", systems),
        ("--prompt-template", "template", templates),
        ("--prompt-scorer", "scorer", scorers),
    ]
    for option, field, given in settings:
        for name, text in pairs(given, option, "asked=TEXT"):
            if name not in (found := [prompts.name for prompts in sets]):
                raise misused(option, f"there is no prompt set {name!r}, only {', '.join(found)}.")
            try:
                sets = [dataclasses.replace(s, **{field: text}) if s.name == name else s for s in sets]  # type: ignore[arg-type]
            except ValueError as error:
                raise misused(option, str(error)) from error
    return sets


def _suite(written: str, reading: dict[str, Any], kinds: Any = None) -> list[PromptSet]:
    """Return the sets of a suite that is written as NAME, NAME@REVISION, NAME=PATH or NAME=FILE:COLUMN."""
    from ..data import load_suite

    name, _, path = written.partition("=")
    path, options = _with_column(path, reading)
    sets = load_suite(name, path or None, kinds=kinds, options=options)
    for prompts in sets:
        note(f"{prompts.source}: {len(prompts):,} {prompts.kind} prompts")
    return sets


def _prompt_set(kind: Any, source: str, reading: dict[str, Any]) -> PromptSet:
    from ..data import general_prompts, load_prompts

    if source.startswith("suite:"):
        return _suite(source.removeprefix("suite:"), reading, (kind,))[0]
    if source in BUILT_IN and kind == "task":
        raise misused("--prompts", f"there is no {source} task; give a file of questions with answers.")
    if source == "general":
        return general_prompts(kind)
    if source == "testbed":
        from ..testbed import prompt_set

        return dataclasses.replace(prompt_set(kind), source=source)
    source, options = _with_column(source, reading)
    prompts, report = load_prompts(source, kind, options=options)
    note(report)
    return prompts


def _with_column(source: str, reading: dict[str, Any]) -> tuple[str, Any]:
    """Return the file and the options for FILE:COLUMN; any other source as it is."""
    file, _, column = source.rpartition(":")
    has_column = os.path.isfile(file)
    options = read_options([f"prompt={column}"] if has_column else None, **reading)
    return file if has_column else source, options


def _is_embedded(model: str) -> bool:
    from ..testbed import ALIGNED, UNALIGNED

    return Path(model).resolve() in (ALIGNED.resolve(), UNALIGNED.resolve())


def check_judges(listed: list[str] | None) -> list[str]:
    """Return the judges that `--judge` names, or the usual ones, before anything is loaded."""
    from ..evaluation.judges import DEFAULT, check_judges

    try:
        check_judges(asked := listed or list(DEFAULT))
    except ValueError as error:
        raise misused("--judge", str(error)) from error
    return asked


def load_harness(tasks: list[str] | None, limit: int | None, batch_size: int) -> Harness | None:
    """Return the harness that asks what `--task` names, or `None` if it names nothing."""
    from ..evaluation import Harness
    from ..evaluation.harness import PREFIX

    odd = [task for task in tasks or () if not task.startswith(PREFIX)]
    if odd:
        raise misused("--task", f"got {odd[0]!r}, expected a form such as {PREFIX}gsm8k.")
    if limit and not tasks:
        raise misused("--limit", "is about --task, and none is given.")
    return Harness([task.removeprefix(PREFIX) for task in tasks], limit, batch_size) if tasks else None


def check_new(output: Path) -> None:
    """Refuse to write over a file, or into a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise misused("--output", f"{output} exists already. Name another, or remove it.")


def check_folder(option: str, source: str, what: str = "adapter") -> None:
    """Refuse what can only be a folder and is none; the id of an adapter has an owner, as in `me/my-adapter`."""
    may_be_id = source[:1] not in (".", "/", "~") and ("/" in source or what == "model")
    if not may_be_id and not Path(source).expanduser().is_dir():
        raise misused(option, f"there is no folder `{source}`. Give the folder of the {what}, or its Hub id.")


def check_model(option: str, source: str) -> None:
    """Refuse a folder that is missing, empty, or holds no complete model; a Hub id is taken as it is."""
    from ..recipe import paths

    check_folder(option, source, "model")
    try:
        paths.check_model(source)
    except ValueError as error:
        raise misused(option, str(error)) from error


def read_options(
    column: list[str] | None,
    where: list[str] | None = None,
    limit: int | None = None,
    *,
    skip_bad: bool = False,
    encoding: str | None = None,
) -> Any:
    """Return how rows are read, from `--column`, `--where`, `--limit`, `--skip-bad` and `--encoding`."""
    from ruamel.yaml import YAML

    from ..data import ReadOptions

    columns = dict(pairs(column, "--column", "prompt=question"))
    values = {key: YAML(typ="safe").load(text) for key, text in pairs(where, "--where", "is_safe=false")}
    on_bad_row: Any = "skip" if skip_bad else "raise"
    chosen: dict[str, Any] = {"columns": columns or None, "where": values or None, "limit": limit}
    return ReadOptions(**chosen, on_bad_row=on_bad_row, encoding=encoding)


def read_rows(source: str, argument: str, options: Any) -> Any:
    """Return the rows of a source, and show what was found in it."""
    from ..data import as_rows

    rows, report = as_rows(source, argument=argument, options=options)
    note(report)
    return rows
