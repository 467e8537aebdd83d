"""Step 2: cards to choose from, settings, and the files that methods and the comparison need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer.methods.base import FormField

from .. import texts
from ..recipes import PLAIN, RECOMMENDED, Settings, cards, defaults, field_default
from ..sessions import Session
from ..setup import Setup
from . import html
from .own_panel import JudgePanel, OwnPanel

FIRST_CHOICE = (PLAIN, RECOMMENDED)
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 100_000),
    "learning_rate": (0.0000001, 1.0),
    "lora_rank": (1, 256),
    "batch_size": (1, 256),
    "max_length": (8, 8192),
    "seed": (0, 2**31 - 1),
    "held_out": (0, 50),
    "prompts": (5, 10_000),
    "answer_tokens": (1, 1024),
}
"""The smallest and the largest value of each setting, in the order of the page."""
_MAIN, _FRACTION = ("steps", "learning_rate"), "learning_rate"


class MethodStep:
    """The step's layout, and its updates. Cards and fields are those of the library's methods.

    Args:
        others (`Mapping[str, Any]`, *optional*): Boxes of other steps that are kept with this form, by name.
    """

    def __init__(self, setup: Setup, others: Mapping[str, Any] | None = None) -> None:
        self.others = dict(others or {})
        gr.Markdown(f"## {texts.METHOD_HEADING}\n{texts.METHOD_LEAD}")
        with gr.Row(elem_classes="actions"):
            self.recipe = gr.UploadButton(
                texts.RECIPE_IN, file_types=[".yaml", ".yml"], size="sm", elem_id="recipe-in"
            )
            self.drop_recipe = gr.Button(texts.RECIPE_DROP, visible=False, size="sm", elem_id="recipe-drop")
        self.taken = gr.HTML(elem_id="taken", js_on_load=None)
        self.known = cards()
        self.cards: dict[str, gr.Checkbox] = {}
        with gr.Row(elem_classes="cards"):
            for key, card in self.known.items():
                with gr.Column(elem_classes="card", min_width=280):
                    self.cards[key] = gr.Checkbox(
                        label=card.title, value=key in FIRST_CHOICE, container=False, elem_id=f"card-{key}"
                    )
                    values = zip(texts.CARD_LABELS, (card.needs, card.cost, card.avoid), strict=True)
                    rest = html.join(Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in values)
                    gr.HTML(Markup("<p>{}</p><dl>{}</dl>").format(card.summary, rest), js_on_load=None)
        with gr.Row():
            self.settings = {name: _number(name) for name in _MAIN}
        with gr.Accordion(texts.ADVANCED, open=False, elem_id="advanced"), gr.Row():
            self.settings |= {name: _number(name) for name in RANGES if name not in _MAIN}
            self.fields = {
                (key, one.name): _field(key, card.title, one)
                for key, card in self.known.items()
                for one in card.fields
            }
        self.own = OwnPanel()
        self.judging = JudgePanel(setup)
        self.problem = gr.HTML(elem_id="method-problem", js_on_load=None)
        self.check = gr.Button(texts.CHECK, variant="primary", elem_id="check")

    @property
    def form(self) -> dict[str, Any]:
        """What [`read`] reads, by name: `use.METHOD`, a setting of [`Settings`], or `METHOD.FIELD`."""
        cards = {f"use.{key}": box for key, box in self.cards.items()}
        fields = {f"{key}.{name}": field for (key, name), field in self.fields.items()}
        return self.others | cards | self.settings | self.judging.form | fields

    def first(self, session: Session) -> dict[str, Any]:
        """Return what the form shows before the user has entered anything."""
        found = session.inspection
        settings = defaults(session.model, found.rows if found else 0, found.example if found else None)
        chosen = {f"use.{key}": key in FIRST_CHOICE for key in self.cards}
        fields = {f"{key}.{name}": field_default(key, name, session.model) for key, name in self.fields}
        return dict.fromkeys(self.others, False) | chosen | vars(settings) | fields

    def values(self, session: Session) -> dict[str, Any]:
        """Return what the form shows."""
        return self.first(session) | session.form

    def entered(self, session: Session, values: Sequence[Any]) -> dict[str, Any]:
        """Return what the user has changed in the form; the rest goes on following the data and the model."""
        first = self.first(session)
        given = zip(self.form, values, strict=True)
        return {name: value for name, value in given if value != first[name]}

    def show(self, session: Session) -> dict[Any, Any]:
        """Return updates: what the model lacks cannot be chosen; what the user has entered stays."""
        shown: dict[Any, Any] = {self.problem: "", **self.own.show(session)}
        shown |= self.show_taken(session)
        values = self.values(session)
        for key, box in self.cards.items():
            possible = bool(session.model.unaligned) or not self.known[key].needs_unaligned
            note = "" if possible else f" ({texts.NEEDS_SHORT})"
            chosen = bool(values[f"use.{key}"] and possible)
            shown[box] = gr.Checkbox(interactive=possible, label=self.known[key].title + note, value=chosen)
        rest = (name for name in self.form if not name.startswith("use.") and name not in self.others)
        return shown | {self.form[name]: values[name] for name in rest}

    def show_taken(self, session: Session, problem: str = "") -> dict[Any, Any]:
        """Return updates that say what became of the user's recipe."""
        taken, parts = session.taken, [html.panel("error", problem)] if problem else []
        if taken is not None:
            parts.append(html.panel("good", texts.RECIPE_TAKEN.format(name=taken.name)))
            kept = "; ".join(f"{place}: {value}" for place, value in taken.kept.items())
            parts += [html.panel("info", texts.RECIPE_KEPT.format(kept=kept))] if kept else []
            left = texts.RECIPE_LEFT.format(left="; ".join(taken.left))
            parts += [html.panel("warning", f"{left} {texts.RECIPE_FILES}")] if taken.left else []
        return {self.taken: html.join(parts), self.drop_recipe: gr.Button(visible=taken is not None)}

    def read(self, session: Session) -> tuple[list[str], Settings, dict[str, dict[str, Any]]]:
        """Return methods, settings and the methods' fields of a session; a `ValueError` names a wrong one."""
        values = self.values(session)
        keys = [key for key in self.cards if values[f"use.{key}"] is True]
        given: dict[str, Any] = {name: str(values[name] or "") for name in self.judging.form}
        for name, (low, high) in RANGES.items():
            given[name] = _checked(texts.SETTINGS[name][0], values[name], low, high, whole=name != _FRACTION)
        fields: dict[str, dict[str, Any]] = {}
        for key, name in self.fields:
            one = next(one for one in self.known[key].fields if one.name == name)
            value = values[f"{key}.{name}"]
            if key in keys and value is not None and value != "":
                fields.setdefault(key, {})[name] = _read_field(one, value)
        return keys, Settings(**given), fields


def _checked(name: str, value: Any, low: float | None, high: float | None, *, whole: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(texts.NUMBER_MISSING.format(name=name))
    if whole and value != int(value):
        raise ValueError(texts.NUMBER_WHOLE.format(name=name, value=value))
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(
            texts.NUMBER_RANGE.format(name=name, low=html.plain(low), high=html.plain(high), value=html.plain(value))
        )
    return int(value) if whole else float(value)


def _read_field(one: FormField, value: Any) -> Any:
    if one.choices:
        if value not in one.choices:
            raise ValueError(f"{one.label}: {', '.join(one.choices)}")
        return value
    if isinstance(value, bool):
        return value
    return _checked(one.label, value, one.minimum, one.maximum, whole=one.step == 1)


def _number(name: str) -> gr.Number:
    label, info = texts.SETTINGS[name]
    step = 1 if name != _FRACTION else 0.0001
    return gr.Number(label=label, info=info or None, step=step, elem_id=f"set-{name}", min_width=180)


def _field(key: str, title: str, one: FormField) -> Any:
    label = one.label if one.label.startswith(title) else f"{title}: {one.label}"
    about: Mapping[str, Any] = {"label": label, "info": one.help or None, "elem_id": f"set-{key}-{one.name}"}
    if one.choices:
        return gr.Dropdown(list(one.choices), filterable=False, min_width=180, **about)
    return gr.Number(step=one.step or 0.1, min_width=180, **about)
