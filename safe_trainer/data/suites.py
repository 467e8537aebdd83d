"""Named suites of prompts: where each is, which of its rows are of which kind, and under which licence."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from .loaders import HubDataset, hub_dataset, is_folder
from .prompts import Kind, PromptSet, load_prompts
from .reading import ReadOptions


@cache
def suites() -> dict[str, dict[str, Any]]:
    """Return what is known of each suite, by name: `title`, `measures`, `licence`, `citation`, `page` and `sets`.

    `revision` is the commit that is read, where one is pinned. Each of its sets has `kind`, and where it is: `hub`
    (name, subset, split) or `url`, `file`, `where`, and what is said around its prompts (`system_prompt`, `template`).
    """
    import yaml

    return dict(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


def load_suite(
    name: str,
    path: str | Path | None = None,
    *,
    kinds: tuple[Kind, ...] | None = None,
    options: ReadOptions | None = None,
) -> list[PromptSet]:
    """Load a published suite by name: a set for each kind of prompts in it.

    Args:
        name (`str`): Such as `"xstest"`; [`suites`] has all of them, with licences, papers and the revision that is
            read. `"xstest@main"` reads another one.
        path (`str` or `Path`, *optional*): A local copy: its file, or the folder of its files. Left out, the suite is
            loaded from the Hub, or from where its authors publish it.
        kinds (`tuple[str, ...]`, *optional*): Takes the sets of these kinds only.
        options ([`ReadOptions`], *optional*): How its files are read, such as the `encoding` of a local copy, or the
            `limit` of prompts of each set; `where` is asked in addition to what tells the suite's kinds apart.

    Returns:
        `list[PromptSet]`: Their `source` is the suite with the revision that was read, such as `"suite:xstest@f600…"`,
            or with the name of the local copy, `"suite:xstest=xstest_prompts.csv"`.

    Raises:
        FileNotFoundError: If the local copy has none of the suite's files.
        ValueError: If there is no such suite, a revision is named of a local copy, or it could not be loaded; says
            where to get it.

    Example:

    ```python
    from safe_trainer.data import load_suite

    harmful, borderline = load_suite("xstest", "xstest_prompts.csv")
    print(harmful.kind, len(harmful), borderline.kind, len(borderline))
    ```
    """
    name, _, revision = name.partition("@")
    if name not in suites():
        raise ValueError(f"There is no suite `{name}`. Take one of {', '.join(suites())}.")
    if revision and path is not None:
        raise ValueError(
            f"`{name}@{revision}` names a revision, which a local copy (`{path}`) has not. Give one of both."
        )
    suite = suites()[name]
    revision = revision or suite.get("revision", "")
    wanted = [part for part in suite["sets"] if kinds is None or part["kind"] in kinds]
    local = Path(path) if path is not None else None
    if local is not None and not is_folder(local):  # one file, which may be that of one set
        wanted = [part for part in wanted if part.get("file") == local.name] or wanted
    if not wanted:
        raise ValueError(f"The suite `{name}` has no prompts of kind {', '.join(kinds or ())}.")
    found, options = [], options or ReadOptions()
    for part in wanted:
        title = name if len(suite["sets"]) == 1 else f"{name} {part['kind']}"
        where = {**part.get("where", {}), **(options.where or {})}
        reading = replace(options, where=where or None)
        try:
            prompts, _ = load_prompts(_source(part, local, revision), part["kind"], title, reading)
        except ValueError as error:
            at = f" (commit {revision})" if revision else ""
            raise ValueError(
                f"The suite `{name}` could not be read: {error} Get it from {suite['page']}{at}, licence: "
                f"{suite['licence']}, and give the file or folder as `path`."
            ) from error
        said = {key: part.get(key) for key in ("system_prompt", "template")}
        read = hub_dataset(prompts.source or "")
        commit = read.revision if read else revision
        shown = f"={local.name}" if local else f"@{commit}" if commit else ""
        found.append(replace(prompts, source=f"suite:{name}{shown}", **said))
    return found


def _source(part: dict[str, Any], local: Path | None, revision: str) -> Any:
    if local is not None:
        file = local / str(part.get("file"))
        return file if file.is_file() else local
    if "hub" in part:
        name, subset, split = part["hub"]
        return HubDataset(name, subset, split, revision=revision or None)
    if "url" not in part:
        raise ValueError("it is not published as one dataset.")
    from datasets import load_dataset

    url = part["url"].replace("{revision}", revision)
    try:
        return load_dataset("csv", data_files=url, split="train")
    except Exception as error:  # `datasets` raises what the network and the reader of the file raise
        raise ValueError(f"`{url}` could not be downloaded: {str(error).rstrip('.')}.") from error
