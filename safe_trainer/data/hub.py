"""Datasets on the Hub, or laid out like one in a folder, as a source of records beside files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .parsing import Record

PREFIX = "hf:"
_FOLDER = tuple("./~")  # how the name of a folder begins


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset.

    Args:
        name (`str`): Its id on the Hub, such as `"tatsu-lab/alpaca"`, or a folder with files of data.
        subset (`str`, *optional*): Its configuration, where it has several.
        split (`str`, *optional*): Its split; may be left out where there is only one.
        column (`str`, *optional*): The column that holds the prompts; left out, told by the names of the columns.
    """

    name: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.name}/{self.subset}" if self.subset else self.name, self.split or "", self.column or ""]
        return PREFIX + ":".join(parts).rstrip(":")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.name[:1] in _FOLDER

    def records(self) -> Iterator[Record]:
        """Yield its rows, from the files that `datasets` keeps for it, in bounded memory.

        Raises:
            ValueError: If it cannot be had, or has several splits of which none is named.
        """
        rows = self._rows()
        if self.column is not None and self.column not in rows.column_names:
            columns = ", ".join(f"`{name}`" for name in rows.column_names)
            raise ValueError(f"`{self}` has no column `{self.column}`. It has {columns}.")
        return (Record(number, row) for number, row in enumerate(rows, 1))

    def _rows(self):  # type: ignore[no-untyped-def]  # a `Dataset`, which is not imported for its name
        from datasets import Dataset, load_dataset

        name = self.name
        if self.is_folder:
            name = str(Path(name).expanduser())
            if not Path(name).is_dir():
                raise ValueError(f"There is no folder `{name}`. Check the path; it is looked for in {Path.cwd()}.")
        try:
            found = load_dataset(name, self.subset, split=self.split)
        except Exception as error:  # `datasets` raises what the network, the Hub and each reader of files raise
            raise ValueError(
                f"`{self}` could not be loaded: {str(error).rstrip('.')}. Write {PREFIX}owner/name, then /subset, "
                ":split and :column as needed; for a private or gated dataset, log in with `hf auth login`."
            ) from error
        if isinstance(found, Dataset):
            return found
        if len(found) > 1:
            splits = ", ".join(f"{PREFIX}{self.name}:{split}" for split in found)
            raise ValueError(f"`{self}` has several splits. Name one of them, as in {splits}.")
        return next(iter(found.values()))


def hub_dataset(source: str | Path) -> HubDataset | None:
    """Read a source such as `hf:owner/name/subset:split:column`, all but the name optional; `None` for a file.

    A name that begins with `.`, `/` or `~` is a folder, and has no subset.

    Raises:
        ValueError: If it begins like one and is none.

    Example:

    ```python
    >>> hub_dataset("hf:walledai/XSTest:test"), hub_dataset("rows.csv")
    (HubDataset(name='walledai/XSTest', subset=None, split='test', column=None), None)

    ```
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return None
    name, *rest = text.removeprefix(PREFIX).split(":")
    subset = None
    if name[:1] not in _FOLDER:
        owner, _, inner = name.partition("/")
        inner, _, subset = inner.partition("/")
        name = f"{owner}/{inner}" if inner else owner
    if not name or len(rest) > 2 or (subset and "/" in subset):
        raise ValueError(
            f"`{text}` is no dataset. Write {PREFIX}owner/name, then /subset, :split and :column as needed."
        )
    split, column = [*(part or None for part in rest), None, None][:2]
    return HubDataset(name, subset or None, split, column)
