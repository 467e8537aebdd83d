"""Step 2: cards to choose from, and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import texts
from ..catalogue import PLAIN, PROTECTIONS, Model, Strengths
from ..orders import Settings
from . import html

FIRST_CHOICE = (PLAIN, "recommended")

RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 100_000),
    "learning_rate": (1e-7, 1.0),
    "lora_rank": (1, 256),
    "batch_size": (1, 256),
    "max_length": (8, 8192),
    "seed": (0, 2**31),
    "prompts": (5, 160),
    "answer_tokens": (1, 1024),
    "asft_weight": (0.0, 1e6),
    "salora_rank": (1, 1024),
    "vectors_strength": (0.0, 100.0),
    "drift_weight": (0.0, 1e6),
}
"""The settings, with the smallest and the largest value of each; those with a point are fractions."""

_MAIN = ("steps", "learning_rate")
_OF_STRENGTHS = ("asft_weight", "salora_rank", "vectors_strength", "drift_weight")


@dataclass
class MethodStep:
    """Components of the step."""

    cards: dict[str, gr.Checkbox]
    settings: dict[str, gr.Number]
    problem: gr.HTML
    check: gr.Button

    @property
    def shown(self) -> list[Any]:
        """What [`show`] fills in."""
        return [*self.cards.values(), *self.settings.values()]


def build() -> MethodStep:
    """Lay out the step."""
    gr.HTML(html.heading(texts.METHOD_HEADING, texts.METHOD_LEAD), js_on_load=None)
    cards: dict[str, gr.Checkbox] = {}
    with gr.Row(elem_classes="cards"):
        for key in PROTECTIONS:
            with gr.Column(elem_classes="card", min_width=280):
                cards[key] = gr.Checkbox(
                    label=texts.CARDS[key].title, value=key in FIRST_CHOICE, container=False, elem_id=f"card-{key}"
                )
                gr.HTML(_card(key), js_on_load=None)
    with gr.Row():
        settings = {name: _number(name) for name in _MAIN}
    with gr.Accordion(texts.ADVANCED, open=False, elem_id="advanced"), gr.Row():
        settings |= {name: _number(name) for name in RANGES if name not in _MAIN}
    problem = gr.HTML(elem_id="method-problem", js_on_load=None)
    check = gr.Button(texts.CHECK, variant="primary", elem_id="check")
    return MethodStep(cards, settings, problem, check)


def show(model: Model, settings: Settings) -> list[Any]:
    """Return updates of `MethodStep.shown`: what the model lacks cannot be chosen."""
    cards = []
    for key, protection in PROTECTIONS.items():
        possible = bool(model.unaligned) or not protection.needs_unaligned
        note = "" if possible else f" ({texts.NEEDS_SHORT})"
        update = {"interactive": possible, "label": texts.CARDS[key].title + note}
        cards.append(gr.Checkbox(**update) if possible else gr.Checkbox(value=False, **update))
    values = {**vars(settings), **vars(settings.strengths)}
    return [*cards, *(values[name] for name in RANGES)]


def read(values: Sequence[Any]) -> tuple[list[str], Settings]:
    """Return what was chosen from the values of `MethodStep.shown`.

    Raises:
        ValueError: If a number is missing or out of its range.
    """
    count = len(PROTECTIONS)
    keys = [key for key, chosen in zip(PROTECTIONS, values[:count], strict=True) if chosen is True]
    given: dict[str, Any] = {}
    for name, value in zip(RANGES, values[count:], strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(texts.NUMBER_MISSING.format(name=texts.SETTINGS[name][0]))
        low, high = RANGES[name]
        given[name] = float(value) if isinstance(high, float) else int(value)
        if not low <= given[name] <= high:
            message = texts.NUMBER_RANGE.format(name=texts.SETTINGS[name][0], low=low, high=high, value=value)
            raise ValueError(message)
    strengths = Strengths(**{name: given.pop(name) for name in _OF_STRENGTHS})
    return keys, replace(Settings(**given), strengths=strengths)


def _card(key: str) -> Markup:
    card = texts.CARDS[key]
    rest = html.join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(label, value)
        for label, value in zip(texts.CARD_LABELS, (card.needs, card.costs, card.not_for), strict=True)
    )
    return Markup("<p>{}</p><dl>{}</dl>").format(card.what, rest)


def _number(name: str) -> gr.Number:
    label, info = texts.SETTINGS[name]
    precision = None if isinstance(RANGES[name][1], float) else 0
    return gr.Number(label=label, info=info or None, precision=precision, elem_id=f"set-{name}", min_width=180)
