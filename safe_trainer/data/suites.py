"""Named suites of prompts: where each is, which of its rows are of which kind, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .loaders import HubDataset, is_folder
from .prompts import Kind, PromptSet, load_prompts
from .reading import ReadOptions


@dataclass(frozen=True)
class Suite:
    """A published suite of prompts.

    Args:
        name (`str`): What [`load_suite`] calls it, such as `"xstest"`.
        title (`str`): Its own name.
        measures (`str`): What it measures.
        licence (`str`): The licence of its prompts.
        citation (`str`): Its paper.
        page (`str`): Where a person finds it.
        sets (`tuple[dict, ...]`): Its sets, each with `kind` and where it is: `hub` (name, subset, split) or `url`,
            `file`, `where`, and what is said around its prompts (`system_prompt`, `template`).
    """

    name: str
    title: str
    measures: str
    licence: str
    citation: str
    page: str
    sets: tuple[dict[str, Any], ...]


@cache
def suites() -> dict[str, Suite]:
    """Return the suites that are known, by name."""
    import yaml

    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: Suite(name, **entry | {"sets": tuple(entry["sets"])}) for name, entry in entries.items()}


def load_suite(
    name: str, path: str | Path | None = None, *, kinds: tuple[Kind, ...] | None = None, limit: int | None = None
) -> list[PromptSet]:
    """Load a published suite by name: a set for each kind of prompts in it.

    Args:
        name (`str`): Such as `"xstest"`; [`suites`] has all of them, with licences and papers.
        path (`str` or `Path`, *optional*): A local copy: its file, or the folder of its files. Left out, the suite is
            loaded from the Hub, or from where its authors publish it.
        kinds (`tuple[str, ...]`, *optional*): Takes the sets of these kinds only.
        limit (`int`, *optional*): Prompts of each set, from the first.

    Raises:
        FileNotFoundError: If the local copy has none of the suite's files.
        ValueError: If there is no such suite, or it could not be loaded; says where to get it.

    Example:

    ```python
    from safe_trainer.data import load_suite

    harmful, borderline = load_suite("xstest", "xstest_prompts.csv")
    print(harmful.kind, len(harmful), borderline.kind, len(borderline))
    ```
    """
    if name not in suites():
        raise ValueError(f"There is no suite `{name}`. Take one of {', '.join(suites())}.")
    suite = suites()[name]
    wanted = [part for part in suite.sets if kinds is None or part["kind"] in kinds]
    local = Path(path) if path is not None else None
    if local is not None and not is_folder(local):  # one file, which may be that of one set
        wanted = [part for part in wanted if part.get("file") == local.name] or wanted
    if not wanted:
        raise ValueError(f"The suite `{name}` has no prompts of kind {', '.join(kinds or ())}.")
    return [_load(suite, part, local, limit, single=len(suite.sets) == 1) for part in wanted]


def _load(suite: Suite, part: dict[str, Any], local: Path | None, limit: int | None, single: bool) -> PromptSet:
    options = ReadOptions(where=part.get("where"), limit=limit)
    title = suite.name if single else f"{suite.name} {part['kind']}"
    try:
        found, _ = load_prompts(_source(suite, part, local), part["kind"], title, options)
    except ValueError as error:
        raise ValueError(
            f"The suite `{suite.name}` could not be read: {error} Get it from {suite.page} (licence: "
            f"{suite.licence}), and give the file or folder as `path`."
        ) from error
    said: dict[str, Any] = {name: part.get(name) for name in ("system_prompt", "template")}
    return replace(found, source=f"suite:{suite.name}", **said)


def _source(suite: Suite, part: dict[str, Any], local: Path | None) -> Any:
    if local is not None:
        file = local / str(part.get("file"))
        return file if is_folder(local) and file.exists() else local
    if "hub" in part:
        return HubDataset(*part["hub"])
    if "url" not in part:
        raise ValueError("it is not published as one dataset.")
    from datasets import load_dataset

    try:
        return load_dataset("csv", data_files=part["url"], split="train")
    except Exception as error:  # `datasets` raises what the network and the reader of the file raise
        raise ValueError(f"`{part['url']}` could not be downloaded: {str(error).rstrip('.')}.") from error
