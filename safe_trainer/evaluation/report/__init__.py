"""A comparison as files that others can read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..results import Comparison
from ..storage import to_json
from .charts import place
from .html import to_html
from .markdown import to_markdown

__all__ = ["place", "to_html", "to_markdown", "write_atomically", "write_report"]


def write_report(comparison: Comparison, directory: str | Path, name: str = "comparison") -> list[Path]:
    """Write `<name>.json` (everything), `<name>.md` (for a model card) and `<name>.html` (for people).

    Each file is complete or not there: a failure, such as a full disk, leaves an older file as it was.

    Args:
        comparison (`Comparison`): What to write.
        directory (`str` or `Path`): Where to; created if it is missing.
        name (`str`, *optional*, defaults to `"comparison"`): The files' name without its ending.

    Returns:
        `list[Path]`: The files.

    Example:

    ```python
    write_report(compare(model, tokenizer, prompt_sets, {"AsFT": "out/asft"}), "out/report")
    ```
    """
    contents = {".json": to_json(comparison), ".md": to_markdown(comparison), ".html": to_html(comparison)}
    return [write_atomically(Path(directory) / f"{name}{ending}", text) for ending, text in contents.items()]


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it when it is complete.

    Args:
        path (`Path`): The file; its folder is created if it is missing.
        text (`str`): Its content, written as UTF-8.

    Raises:
        OSError: If it cannot be written. A file that was there is then unchanged, and no temporary one is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a report is for others too.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
