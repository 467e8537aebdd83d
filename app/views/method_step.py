"""Step 2: cards to choose from, settings, and the files that methods and the comparison need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer import FormField

from .. import texts
from ..inspection import ENDINGS
from ..recipes import PLAIN, RECOMMENDED, Settings, cards, field_default
from ..sessions import Session
from ..setup import KINDS, Model
from . import html

FIRST_CHOICE = (PLAIN, RECOMMENDED)
WHOLE = {
    "steps": (1, 100_000),
    "lora_rank": (1, 256),
    "batch_size": (1, 256),
    "max_length": (8, 8192),
    "seed": (0, 2**31 - 1),
    "prompts": (5, 160),
    "answer_tokens": (1, 1024),
}
"""The settings that are whole numbers, with the smallest and the largest value of each."""
FRACTIONS = {"learning_rate": (0.0000001, 1.0)}
_MAIN = ("steps", "learning_rate")
_ORDER = (*_MAIN, *(name for name in WHOLE if name not in _MAIN))


class MethodStep:
    """The step's layout, and its updates. Cards and fields are those of the library's methods."""

    def __init__(self) -> None:
        gr.Markdown(f"## {texts.METHOD_HEADING}\n{texts.METHOD_LEAD}")
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
            self.settings |= {name: _number(name) for name in _ORDER if name not in _MAIN}
            self.fields = {
                (key, one.name): _field(key, card.title, one)
                for key, card in self.known.items()
                for one in card.fields
            }
        with gr.Accordion(texts.FILES, open=False, elem_id="files-panel") as self.files_panel:
            self.files_hint = gr.Markdown()
            kinds = [(label, kind) for kind, label in texts.MATERIALS.items()]
            self.kind = gr.Dropdown(
                kinds, value=kinds[0][1], label=texts.FILES_KIND, elem_id="file-kind", filterable=False
            )
            self.upload = gr.File(
                label=texts.FILES_UPLOAD, file_types=list(ENDINGS), elem_id="file-upload", height=110
            )
            self.files = gr.HTML(elem_id="files", js_on_load=None)
            self.remove = gr.Button(texts.FILES_REMOVE, elem_id="file-remove")
        self.problem = gr.HTML(elem_id="method-problem", js_on_load=None)
        self.check = gr.Button(texts.CHECK, variant="primary", elem_id="check")

    @property
    def form(self) -> list[Any]:
        """What [`read`] reads."""
        return [*self.cards.values(), *(self.settings[name] for name in _ORDER), *self.fields.values()]

    def show(self, session: Session, defaults: Settings) -> dict[Any, Any]:
        """Return updates: what the model lacks cannot be chosen; what the user has entered stays."""
        model = session.model
        shown: dict[Any, Any] = {self.problem: "", **self.show_files(session)}
        values = [*(key in FIRST_CHOICE for key in self.cards), *(vars(defaults)[name] for name in _ORDER)]
        values += [field_default(key, name, model) for key, name in self.fields]
        values = session.form or values
        for (key, box), chosen in zip(self.cards.items(), values[: len(self.cards)], strict=True):
            possible = bool(model.unaligned) or not self.known[key].needs_unaligned
            note = "" if possible else f" ({texts.NEEDS_SHORT})"
            label = self.known[key].title + note
            shown[box] = gr.Checkbox(interactive=possible, label=label, value=bool(chosen and possible))
        shown |= dict(zip(self.form[len(self.cards) :], values[len(self.cards) :], strict=True))
        return shown

    def show_files(self, session: Session, problem: str = "") -> dict[Any, Any]:
        """Return updates of the list of files in use."""
        rows = []
        for kind, label in texts.MATERIALS.items():
            own, built_in = session.files.get(kind), _is_built_in(kind, session.model)
            words = texts.FILES_OWN.format(name=own.name, count=own.rows) if own else texts.FILES_NONE
            rows.append([label, texts.FILES_BUILT_IN if built_in and own is None else words])
        shown = html.table(texts.FILES, texts.FILES_COLUMNS, rows)
        lead = texts.FILES_LEAD_TINY if session.model.embedded else texts.FILES_LEAD
        return {
            self.files: (html.panel("error", problem) if problem else Markup("")) + shown,
            self.files_hint: lead,
            self.files_panel: gr.Accordion() if problem or session.model.embedded else gr.Accordion(open=True),
        }

    def read(self, values: Sequence[Any]) -> tuple[list[str], Settings, dict[str, dict[str, Any]]]:
        """Return methods, settings and the methods' fields from the values of the form."""
        count = len(self.cards)
        keys = [key for key, chosen in zip(self.cards, values[:count], strict=True) if chosen is True]
        given: dict[str, Any] = {}
        for name, value in zip(_ORDER, values[count : count + len(_ORDER)], strict=True):
            low, high = WHOLE.get(name) or FRACTIONS[name]
            given[name] = _checked(texts.SETTINGS[name][0], value, low, high, whole=name in WHOLE)
        fields: dict[str, dict[str, Any]] = {}
        for (key, name), value in zip(self.fields, values[count + len(_ORDER) :], strict=True):
            one = next(one for one in self.known[key].fields if one.name == name)
            if key in keys and value is not None and value != "":
                fields.setdefault(key, {})[name] = _read_field(one, value)
        return keys, Settings(**given), fields


def _is_built_in(kind: str, model: Model) -> bool:
    return kind != "task" if kind in KINDS else model.embedded


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
    step = 1 if name in WHOLE else 0.0001
    return gr.Number(label=label, info=info or None, step=step, elem_id=f"set-{name}", min_width=180)


def _field(key: str, title: str, one: FormField) -> Any:
    label = one.label if one.label.startswith(title) else f"{title}: {one.label}"
    about: Mapping[str, Any] = {"label": label, "info": one.help or None, "elem_id": f"set-{key}-{one.name}"}
    if one.choices:
        return gr.Dropdown(list(one.choices), filterable=False, min_width=180, **about)
    return gr.Number(step=one.step or 0.1, min_width=180, **about)
