"""Part of step 2: what the comparison asks, how, and who judges the answers."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer.data import suites

from .. import texts
from ..inspection import ENDINGS
from ..materials import SHOWN
from ..recipes import GUARD, JUDGES
from ..sessions import Session
from ..setup import KINDS, Setup, built_in_prompts
from . import html


class PromptsPanel:
    """The panel's layout, and its updates."""

    def __init__(self, setup: Setup) -> None:
        with gr.Accordion(texts.PROMPTS, open=False, elem_id="prompts-panel"):
            self.asked = gr.HTML(elem_id="asked", js_on_load=None)
            self.system_prompt = gr.Textbox(
                "",
                label=texts.SYSTEM_PROMPT,
                info=texts.SYSTEM_PROMPT_INFO,
                max_length=4000,
                elem_id="set-system_prompt",
            )
            self.judge, self.guard = _judge(setup)
            gr.Markdown(f"### {texts.PROMPTS_ADD}\n{texts.PROMPTS_ADD_INFO}")
            with gr.Row():
                choices = [(label, kind) for kind, label in texts.KINDS.items()]
                choices += [(f"{one['title']}: {one['measures']}", name) for name, one in suites().items()]
                self.what = _choice(texts.PROMPTS_KIND, "prompts-kind", choices)
                scorers = [(label, scorer) for scorer, label in texts.SCORERS.items()]
                self.scorer = _choice(texts.SCORER, "scorer", scorers)
            with gr.Row():
                self.own_system = gr.Textbox(
                    "", label=texts.SET_SYSTEM_PROMPT, max_length=4000, elem_id="prompts-system"
                )
                self.frame = gr.Textbox(
                    "", label=texts.FRAME, placeholder=texts.FRAME_HINT, max_length=4000, elem_id="prompts-frame"
                )
            self.upload = gr.File(
                label=texts.PROMPTS_UPLOAD, file_types=list(ENDINGS), elem_id="prompts-upload", height=110
            )
            with gr.Row(elem_classes="actions"):
                self.add = gr.Button(texts.PROMPTS_ADD, elem_id="prompts-add")
                self.remove = gr.Button(texts.PROMPTS_REMOVE, elem_id="prompts-remove")

    @property
    def form(self) -> dict[str, Any]:
        """What is kept with the form of step 2, by the name of the setting."""
        return {"system_prompt": self.system_prompt, "judge": self.judge, "guard": self.guard}

    @property
    def inputs(self) -> list[Any]:
        """What says which prompts to add: file, kind or suite, and what `SAID` names."""
        return [self.upload, self.what, self.own_system, self.frame, self.scorer]

    def emptied(self) -> dict[Any, Any]:
        """Return updates once prompts have been added."""
        return {self.upload: gr.File(value=None), self.own_system: "", self.frame: ""}

    def show(self, session: Session, problem: str = "") -> dict[Any, Any]:
        """Return updates of the list of sets."""
        example = session.inspection.example if session.inspection else None
        own = {one.kind for one in session.asked}
        sets: list[tuple[str, str, int, Any, Any]] = [
            (one.kind, texts.FILES_BUILT_IN, len(one), {}, one.first(SHOWN).conversations())
            for one in built_in_prompts(session.model, example)
            if one.kind not in own
        ]
        sets += [(one.kind, one.name, one.count, one.said, one.shown) for one in session.asked]
        sets.sort(key=lambda one: KINDS.index(one[0]))
        rows = [[texts.KINDS[kind], name, f"{count:,}"] for kind, name, count, *_ in sets]
        shown = [html.table(texts.PROMPTS_CAPTION, texts.PROMPTS_COLUMNS, rows)]
        shown += [_preview(f"{texts.KINDS[kind]} ({name})", kind, said, turns) for kind, name, _, said, turns in sets]
        first = [html.panel("error", problem)] if problem else []
        return {self.asked: html.join(first + shown), self.remove: gr.Button(interactive=bool(session.asked))}


def _preview(title: str, kind: str, said: Any, conversations: Any) -> Markup:
    """Show the first prompts of a set as they will be asked."""
    asked = html.join(
        Markup("<pre>{}</pre>").format(
            html.join(Markup("<b>{}</b> {}\n").format(turn["role"], turn["content"]) for turn in turns)
        )
        for turns in conversations
    )
    scorer = said.get("scorer")
    note = Markup("<p>{}</p>").format(texts.SCORERS[scorer]) if scorer else Markup("")
    content = html.hidden(texts.REVEAL, asked) if kind == "harmful" else asked
    return html.folded(title, Markup('<div class="samples">{}</div>').format(note + content))


def _judge(setup: Setup) -> tuple[gr.Dropdown, gr.Textbox]:
    possible = setup.any_model or len(setup.models) > 1
    judges = [(label, judge) for judge, label in JUDGES.items() if judge != GUARD or possible]
    judge = _choice(texts.JUDGE, "set-judge", judges)
    guard = gr.Textbox(
        "",
        label=texts.GUARD_MODEL,
        info=texts.GUARD_INFO,
        placeholder=texts.MODEL_ID_HINT,
        max_length=250,
        visible=possible,
        elem_id="set-guard",
    )
    return judge, guard


def _choice(label: str, name: str, choices: list[tuple[str, str]]) -> gr.Dropdown:
    return gr.Dropdown(choices, value=choices[0][1], label=label, elem_id=name, filterable=False, min_width=180)
