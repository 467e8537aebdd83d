"""Scored rows on their way into order: on disk, so that memory does not grow with them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Spool:
    """Entries in a temporary file, to be read back from the highest score to the lowest.

    In memory stay 16 bytes for each entry: its score, and where it lies.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()
        self._scores, self._places = array("d"), array("q")

    def __enter__(self) -> Spool:
        """Return itself; the file goes when the context ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._scores)

    def add(self, score: float, entry: dict[str, Any]) -> None:
        """Keep an entry; values that JSON does not know, such as dates, are kept as text. Not after [`ranked`]."""
        encoded = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        self._places.append(self._file.tell())
        self._scores.append(score)
        self._file.write(encoded + b"\n")

    @property
    def scores(self) -> NDArray[np.float64]:
        """Return the scores in the order in which they came."""
        return np.array(self._scores)

    def above(self, threshold: float) -> int:
        """Return how many entries have a score above the threshold."""
        return int((self.scores > threshold).sum())

    def ranked(self) -> Iterator[dict[str, Any]]:
        """Yield the entries from the highest score to the lowest, each with its `rank` from 1."""
        for rank, index in enumerate(np.argsort(-self.scores, kind="stable"), 1):
            self._file.seek(self._places[index])
            yield {"rank": rank, **json.loads(self._file.readline().decode("utf-8", "surrogatepass"))}
