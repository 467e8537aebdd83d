"""Task scorers: is an answer right, compared with its reference? Each set names its own (`PromptSet.scorer`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

_FINAL = " .!?,;:。！？"
_NUMBER = re.compile(
    r"\\d?frac\s*\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<sign>(?<![\w.])[-−–]\s?|)[$€£¥]?"
    r"(?:(?P<whole>\d+)\s+(?P<over>\d+)/(?P<under>[1-9]\d*)|(?P<numerator>\d+)\s*/\s*(?P<denominator>[1-9]\d*)"
    r"|(?P<plain>\d{1,3}(?:[,\u00a0\u202f' ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+))"
)
_CHOICE_NAMED = re.compile(r"(?:answer|option|choice)\b\W{0,12}(?:is|:)?\W{0,4}\b([A-J])\b(?!')", re.IGNORECASE)
_CHOICE_FIRST = re.compile(r"^\W*([A-Ja-j])(?:[).:,\]*]|\W*$)")
_CHOICE_ANY = re.compile(r"\(([A-J])\)|\b([B-HJ])\b(?!')")


def exact_match(answer: str, reference: str) -> bool:
    r"""Compare the texts but for case, outer whitespace, quotation marks or emphasis around, and final punctuation.

    ```python
    >>> exact_match(" Positive.\n", "positive"), exact_match("**C**", "C"), exact_match("C++", "C")
    (True, True, False)

    ```
    """
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    text = " ".join(text.casefold().split())
    while len(text) > 2 and text[0] == text[-1] and text[0] in "*_`\"'":
        text = text[1:-1].strip()
    return text.rstrip(_FINAL) or text


def number_match(answer: str, reference: str) -> bool:
    r"""Compare the last numbers of both, or those after `####`, with thousands, decimals, fractions and signs read.

    ```python
    >>> number_match("She sold 48 + 24 = 72 clips.", "48/2 = 24\n#### 72"), number_match("1,250.50", "1250.5")
    (True, True)

    ```
    """
    found, expected = last_number(answer), last_number(reference)
    return found is not None and found == expected


def last_number(text: str) -> Fraction | None:
    """Return the number that a text ends in, or `None` if it has none."""
    marked = text.rpartition("####")[2]
    found = list(_NUMBER.finditer(marked))
    if not found:
        return None
    part = {name: value for name, value in found[-1].groupdict().items() if value}
    sign = -1 if part.get("sign", "").strip() else 1
    if "top" in part:
        return Fraction(int(part["top"]), int(part["bottom"])) if int(part["bottom"]) else None
    if "whole" in part:
        return sign * (int(part["whole"]) + Fraction(int(part["over"]), int(part["under"])))
    if "numerator" in part:
        return sign * Fraction(int(part["numerator"]), int(part["denominator"]))
    digits = part["plain"]
    if re.search(r"[,\u00a0\u202f' ]\d{3}(?!\d)", digits):  # thousands
        digits = re.sub(r"[,\u00a0\u202f' ]", "", digits)
    return sign * Fraction(digits.replace(",", "."))


def choice_match(answer: str, reference: str) -> bool:
    """Compare the letters of a multiple choice, however they are written.

    ```python
    >>> choice_match("The answer is (B).", "B"), choice_match("B) Paris", "B. Paris"), choice_match("A good one.", "A")
    (True, True, False)

    ```
    """
    found, expected = choice_letter(answer), choice_letter(reference)
    return found is not None and found == expected


def choice_letter(text: str) -> str | None:
    """Return the letter that a text chooses, or `None` if it names none."""
    if named := _CHOICE_NAMED.findall(text):
        return str(named[-1]).upper()
    if first := _CHOICE_FIRST.match(text):
        return first[1].upper()
    letters = [one or other for one, other in _CHOICE_ANY.findall(text)]
    return letters[-1] if letters else None


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact_match,
    "number": number_match,
    "choice": choice_match,
}
