"""What fitting and scanning are given: a model or where it is, rows or the file that they are in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.loading import load_rows
from ...data.rows import Row


def with_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return a model and its tokenizer, loaded from where they are if they are not given themselves.

    Raises:
        ValueError: If the model was built in memory and there is no tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(model) if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "")
    if tokenizer is None and not source:
        raise ValueError("The model was built in memory, so its tokenizer cannot be loaded. Give `tokenizer`.")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    if isinstance(model, (str, Path)):
        model = AutoModelForCausalLM.from_pretrained(source)
    return model, tokenizer


def loaded(rows: Any) -> Any:
    """Return rows, read from their file if they are not given themselves."""
    return load_rows(rows)[0] if isinstance(rows, (str, Path)) else rows


def rows_provenance(rows: Sequence[Row]) -> dict[str, Any]:
    """Return how many rows there are, and the SHA-256 of what they say."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return {"count": len(rows), "sha256": digest.hexdigest()}
