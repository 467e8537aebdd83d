"""Options that several commands share: models, rows, prompts and judges, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from .console import misused, note, pairs

if TYPE_CHECKING:
    from ..data import PromptSet, ReadOptions
    from ..evaluation import Harness

KINDS = ("harmful", "benign", "borderline", "task")
BUILT_IN = ("general", "testbed")

Aligned = Annotated[str, typer.Argument(help="The aligned model: folder or Hub id.")]
NewOutput = Annotated[Path, typer.Option("--output", "-o", help="Where to write; it must not exist yet.")]

MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a row that are read.")]


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with options in place of its parameters that are groups of options, such as [`Reading`]."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, tuple[Any, dict[str, Any]]] = {}
    listed = []
    for name, parameter in signature.parameters.items():
        parameter, group = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY), parameter.annotation
        if not dataclasses.is_dataclass(group):
            listed.append(parameter)
            continue
        groups[name] = group, get_type_hints(group, include_extras=True)
        for field, hint in groups[name][1].items():
            listed.append(parameter.replace(name=field, annotation=hint, default=getattr(group, field)))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (group, hints) in groups.items():
            given[name] = group(**{field: given.pop(field) for field in hints})
        command(**given)

    run.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="In which the models compute; auto is that in which they are saved."),
    ] = "auto"
    quantization: Annotated[
        Literal["4bit", "8bit"] | None, typer.Option(help="The models are loaded in so many bits, by bitsandbytes.")
    ] = None

    def options(self) -> dict[str, Any]:
        """Return this as `load_model` takes it."""
        from ..lora.loading import quantized

        return ({} if self.dtype == "auto" else {"dtype": self.dtype}) | quantized(self.quantization)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files of rows and prompts are read."""

    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without rows that cannot be used.")] = False
    encoding: Annotated[str | None, typer.Option(help="Encoding of the files of rows, such as latin-1.")] = None

    def read_options(self, **more: Any) -> ReadOptions:
        """Return this as the library takes it, with `more` of its options."""
        from ..data import ReadOptions

        return ReadOptions(on_bad_row="skip" if self.skip_bad else "raise", encoding=self.encoding, **more)


@dataclass(frozen=True, kw_only=True)
class Columns(Reading):
    """How a file of rows is read, whose columns may be named."""

    column: Annotated[
        list[str] | None,
        typer.Option(help="prompt=NAME or answer=NAME of a column, where the format is not recognized."),
    ] = None

    def read_options(self, **more: Any) -> ReadOptions:
        """Return this as the library takes it, with `more` of its options."""
        return super().read_options(columns=dict(pairs(self.column, "--column", "prompt=question")) or None, **more)


@dataclass(frozen=True, kw_only=True)
class Rows(Columns):
    """How a file of rows is read, and which of its rows."""

    where: Annotated[list[str] | None, typer.Option(help="Take only rows with this value, such as is_safe=false.")] = (
        None
    )
    limit: Annotated[int | None, typer.Option(min=1, help="How many rows to take, from the first.")] = None

    def read(self, source: str, argument: str) -> Any:
        """Return the rows of a source, and show what was found in it."""
        from ruamel.yaml import YAML

        values = {key: YAML(typ="safe").load(text) for key, text in pairs(self.where, "--where", "is_safe=false")}
        return read_rows(source, argument, self.read_options(where=values or None, limit=self.limit))


@dataclass(frozen=True, kw_only=True)
class Questions(Reading):
    """What models are asked, how, and who judges the answers."""

    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=SOURCE of prompts to ask; may be given several times. KIND is harmful, benign, borderline or "
            "task; SOURCE is a file, or file:column; a folder with a file for each category; "
            "hf:owner/name@revision/subset:split:column for a dataset on the Hub; suite:NAME for a published suite; "
            "`general` or `testbed` for built-in ones. Left out, all built-in ones that suit the model."
        ),
    ] = None
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME of a published suite, such as xstest or strongreject, with all its kinds of prompts, "
            "NAME@REVISION for another revision than the pinned one, or NAME=PATH of a local copy (also "
            "FILE:COLUMN); may be given several times."
        ),
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="lm-eval:NAME of a task of the lm-evaluation-harness, such as lm-eval:gsm8k, or lm-eval:FILE.yaml; "
            "may be given several times. Needs the extra `lm-eval`."
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first questions of each --task.")] = None
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Who judges the answers: phrases, likelihood, guard:MODEL for a guard model (folder or Hub id), or "
            "NAME:MODEL to name how it is asked: llama-guard, shieldgemma, wildguard, harmbench or strongreject (a "
            "rubric, for any chat model); classifier:MODEL for a rejection classifier. May be given several times: "
            "rates follow the first, and agreement is shown. [default: phrases, then likelihood]"
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length at which an answer is cut off.")] = 64
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 32
    system_prompt: Annotated[str | None, typer.Option(help="System turn before each prompt.")] = None
    prompt_system: Annotated[
        list[str] | None, typer.Option(help="NAME=TEXT, a system turn for one prompt set; may be repeated.")
    ] = None
    prompt_template: Annotated[
        list[str] | None, typer.Option(help="NAME=TEXT around each prompt of one set, with {prompt} in it.")
    ] = None
    prompt_scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SCORER for the answers to one task: exact (default), number (the last one) or choice."
        ),
    ] = None

    def check(self, model: str) -> tuple[list[PromptSet], Callable[..., dict[str, Any]]]:
        """Return the prompt sets, and what gives the arguments of `evaluate` and `compare`, with the judges' models.

        All that can be known is checked before any model is loaded; `model` is the one to be asked.
        """
        from ..evaluation.judges import make_judges

        judges = check_judges(self.judge)
        check_model("MODEL", model)
        sets, harness = self.prompt_sets(model), self._harness()
        names = ("max_new_tokens", "batch_size", "system_prompt")

        def arguments(progress: Any) -> dict[str, Any]:
            decoding = {name: getattr(self, name) for name in names}
            return {"judges": make_judges(judges), "harness": harness, "progress": progress, **decoding}

        return sets, arguments

    def prompt_sets(self, model: str) -> list[PromptSet]:
        """Return the prompt sets that `--prompts` and `--suite` name, or those built in for the model."""
        from ..data import apart

        sources = pairs(self.prompts, "--prompts", "harmful=asked.csv")
        unknown = [kind for kind, _ in sources if kind not in KINDS]
        if unknown:
            raise misused("--prompts", f"got the kind {unknown[0]!r}, expected {', '.join(KINDS)}.")
        if not sources and not self.suite:
            from ..testbed import ALIGNED, UNALIGNED

            is_embedded = Path(model).resolve() in (ALIGNED.resolve(), UNALIGNED.resolve())
            fitting = "testbed" if is_embedded else "general"
            sources = [(kind, fitting) for kind in KINDS[:3]]
        sets = [self._prompt_set(kind, source) for kind, source in sources]
        sets += [prompts for written in self.suite or () for prompts in self._suite(written)]
        sets = apart(sets)
        settings = {"system": "system_prompt", "template": "template", "scorer": "scorer"}
        for name, field in settings.items():
            option = f"--prompt-{name}"
            for asked, text in pairs(getattr(self, f"prompt_{name}"), option, "asked=TEXT"):
                if asked not in (found := [prompts.name for prompts in sets]):
                    raise misused(option, f"there is no prompt set {asked!r}, only {', '.join(found)}.")
                try:
                    sets = [dataclasses.replace(s, **{field: text}) if s.name == asked else s for s in sets]  # type: ignore[arg-type]
                except ValueError as error:
                    raise misused(option, str(error)) from error
        return sets

    def _prompt_set(self, kind: Any, source: str) -> PromptSet:
        from ..data import general_prompts, load_prompts

        if source.startswith("suite:"):
            return self._suite(source.removeprefix("suite:"), (kind,))[0]
        if source in BUILT_IN and kind == "task":
            raise misused("--prompts", f"there is no {source} task; give a file of questions with answers.")
        if source == "general":
            return general_prompts(kind)
        if source == "testbed":
            from ..testbed import prompt_set

            return dataclasses.replace(prompt_set(kind), source=source)
        source, options = self._with_column(source)
        prompts, report = load_prompts(source, kind, options=options)
        note(report)
        return prompts

    def _suite(self, written: str, kinds: Any = None) -> list[PromptSet]:
        """Return the sets of a suite that is written as NAME, NAME@REVISION, NAME=PATH or NAME=FILE:COLUMN."""
        from ..data import load_suite

        name, _, path = written.partition("=")
        path, options = self._with_column(path)
        sets = load_suite(name, path or None, kinds=kinds, options=options)
        for prompts in sets:
            note(f"{prompts.source}: {len(prompts):,} {prompts.kind} prompts")
        return sets

    def _with_column(self, source: str) -> tuple[str, ReadOptions]:
        """Return the file and the options for FILE:COLUMN; any other source as it is."""
        file, _, column = source.rpartition(":")
        has_column = os.path.isfile(file)
        options = self.read_options(columns={"prompt": column} if has_column else None)
        return file if has_column else source, options

    def _harness(self) -> Harness | None:
        """Return the harness that asks what `--task` names, or `None` if it names nothing."""
        from ..evaluation import Harness
        from ..evaluation.harness import PREFIX

        odd = [task for task in self.task or () if not task.startswith(PREFIX)]
        if odd:
            raise misused("--task", f"got {odd[0]!r}, expected a form such as {PREFIX}gsm8k.")
        if self.limit and not self.task:
            raise misused("--limit", "is about --task, and none is given.")
        tasks = [task.removeprefix(PREFIX) for task in self.task or ()]
        return Harness(tasks, self.limit, self.batch_size) if tasks else None


def check_judges(listed: list[str] | None) -> list[str]:
    """Return the judges that `--judge` names, or the usual ones, before anything is loaded."""
    from ..evaluation.judges import DEFAULT, check_judges

    try:
        check_judges(asked := listed or list(DEFAULT))
    except ValueError as error:
        raise misused("--judge", str(error)) from error
    return asked


def check_new(output: Path) -> None:
    """Refuse to write over a file, or into a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise misused("--output", f"{output} exists already. Name another, or remove it.")


def check_file(option: str, path: Path) -> None:
    """Refuse a file that is not there."""
    from ..data import what_was_meant

    if not path.is_file():
        found = "is a folder" if path.is_dir() else f"is not a file.{what_was_meant(path)}"
        raise misused(option, f"`{path}` {found}")


def check_folder(option: str, source: str, what: str = "adapter") -> None:
    """Refuse what can only be a folder and is not one; the id of an adapter has an owner, as in `me/my-adapter`."""
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


def read_rows(source: str, argument: str, options: Any) -> Any:
    """Return the rows of a source, and show what was found in it."""
    from ..data import as_rows

    rows, report = as_rows(source, argument=argument, options=options)
    note(report)
    return rows
