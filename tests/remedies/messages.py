"""The messages of the library and the app that name a remedy, found in their source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

ROOT = Path(__file__).resolve().parents[2]
VALUE = "\0"  # in the place of what a message fills in
# How sentences begin that say what to do.
_VERBS = (
    "Add Ask Bring Call Change Check Choose Copy Correct Delete Download Drop Export Fit Fix Free Give Install Judge "
    "Keep Leave Load Log Look Lower Make Mark Measure Merge Name Open Pass Press Put Quote Raise Remove Rename Repair "
    "Resume Run Save See Set Shorten Show Split Start Stop Switch Take Train Try Unfreeze Unpack Update Upload "
    "Use Wait Write".split()
)
_REMEDY = re.compile(rf"(?:^|[.:!?`)] |\n|{VALUE} ?)(?:{'|'.join(_VERBS)}|Evaluate both|Name one) [^{VALUE}]*")


def remedies() -> dict[str, str]:
    """Return every message that names a remedy, and where it is; what it fills in is [`VALUE`]."""
    found = {}
    for path in sorted([*(ROOT / "safe_trainer").rglob("*.py"), *(ROOT / "app").rglob("*.py")]):
        for node in _messages(ast.parse(path.read_text())):
            text = _text(node)
            if _REMEDY.search(text) and not _is_label(text):
                found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _messages(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the texts of a module that are no documentation, the largest of those that are part of another."""
    for node in ast.iter_child_nodes(tree):
        is_documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node
        elif not is_documentation:
            yield from _messages(node)


def _is_label(text: str) -> bool:
    """Return whether it stands on a button or names a setting: a sentence ends, or names code."""
    return not re.search(r"[.?!`]", text) or text.count(".") == len(re.findall(r"\.(?=\w)", text))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    assert isinstance(node, ast.Constant)
    return re.sub(r"%[sdg]|%\.\d\w|\{\w*(:[^}]*)?\}", VALUE, str(node.value))


def words(text: str) -> list[str]:
    """Return the words of a message, or of a regular expression that is looked for in it."""
    return re.findall(r"[\w`'-]*\w[\w`'-]*", re.sub(r"\(\?s\)|\.\*|\\(.)", r" \1", text))


def asks_for(expression: str, text: str) -> bool:
    """Return whether a regular expression asks for words of a message: most of them, the others being values."""
    asked, said = words(expression), words(text)
    if sum(word in said for word in asked) <= 0.69 * len(asked):
        return False
    common = SequenceMatcher(None, asked, said, autojunk=False).get_matching_blocks()
    return sum(block.size for block in common) > 0.69 * len(asked)


def without(expressions: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the messages for which there is no expression, each of which is for one message."""
    asked = csr_array([[asks_for(expression, text) for expression in expressions] for text in texts])
    return [text for text, found in zip(texts, maximum_bipartite_matching(asked, "column"), strict=True) if found < 0]
