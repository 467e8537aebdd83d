"""Part of step 2: the user's own files, for methods and for the comparison, and who judges its answers."""

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


class OwnPanel:
    """The panel of own files: its layout, and its updates."""

    def __init__(self) -> None:
        with gr.Accordion(texts.OWN, open=False, elem_id="own-panel") as self.panel:
            self.lead = gr.Markdown()
            self.listed = gr.HTML(elem_id="own", js_on_load=None)
            with gr.Row():
                choices = [(label, kind) for kind, label in (texts.MATERIALS | texts.KINDS).items()]
                choices += [(f"{one['title']}: {one['measures']}", name) for name, one in suites().items()]
                self.what = _choice(texts.OWN_KIND, "own-kind", choices)
                self.scorer = _choice(texts.SCORER, "scorer", [(label, one) for one, label in texts.SCORERS.items()])
            with gr.Row():
                self.system = gr.Textbox("", label=texts.SET_SYSTEM_PROMPT, max_length=4000, elem_id="own-system")
                self.frame = gr.Textbox(
                    "", label=texts.FRAME, placeholder=texts.FRAME_HINT, max_length=4000, elem_id="own-frame"
                )
            self.upload = gr.File(label=texts.OWN_UPLOAD, file_types=list(ENDINGS), elem_id="own-upload", height=130)
            with gr.Row(elem_classes="actions"):
                self.add = gr.Button(texts.OWN_ADD, elem_id="own-add")
                self.remove = gr.Button(texts.OWN_REMOVE, elem_id="own-remove")

    @property
    def inputs(self) -> list[Any]:
        """What says which file to use: the file, its kind or suite, and what `SAID` names."""
        return [self.upload, self.what, self.system, self.frame, self.scorer]

    def emptied(self, problem: str) -> dict[Any, Any]:
        """Return updates once a file has been taken or refused; what was said of a refused one stays."""
        return {self.upload: gr.File(value=None)} | ({} if problem else {self.system: "", self.frame: ""})

    def show(self, session: Session, problem: str = "") -> dict[Any, Any]:
        """Return updates of the list of files and of sets of prompts."""
        files, embedded = session.files, session.model.embedded
        without = texts.OWN_BUILT_IN if embedded else texts.OWN_NONE
        rows = [
            [label, files[kind].name, f"{files[kind].count:,}"] if kind in files else [label, without, ""]
            for kind, label in texts.MATERIALS.items()
        ]
        example, asked = session.inspection.example if session.inspection else None, session.asked
        kinds = {one.kind for one in asked}
        sets: list[tuple[str, str, int, Any, Any]] = [
            (one.kind, texts.OWN_BUILT_IN, len(one), {}, one.first(SHOWN).conversations())
            for one in built_in_prompts(session.model, example)
            if one.kind not in kinds
        ]
        sets += [(one.kind, one.name, one.count, one.said, one.shown) for one in asked]
        sets.sort(key=lambda one: KINDS.index(one[0]))
        rows += [[texts.KINDS[kind], name, f"{count:,}"] for kind, name, count, *_ in sets]
        shown = [html.panel("error", problem)] if problem else []
        shown.append(html.table(texts.OWN_CAPTION, texts.OWN_COLUMNS, rows))
        shown += [_preview(f"{texts.KINDS[kind]} ({name})", kind, said, turns) for kind, name, _, said, turns in sets]
        return {
            self.listed: html.join(shown),
            self.lead: texts.OWN_LEAD_TINY if embedded else texts.OWN_LEAD,
            self.remove: gr.Button(interactive=bool(session.own)),
            self.panel: gr.Accordion() if embedded and not problem else gr.Accordion(open=True),
        }


class JudgePanel:
    """The panel that says how the comparison asks and who judges."""

    def __init__(self, setup: Setup) -> None:
        with gr.Accordion(texts.JUDGING, open=False, elem_id="judge-panel"):
            self.system_prompt = gr.Textbox(
                "",
                label=texts.SYSTEM_PROMPT,
                info=texts.SYSTEM_PROMPT_INFO,
                max_length=4000,
                elem_id="set-system_prompt",
            )
            self.judge, self.guard = _judge(setup)

    @property
    def form(self) -> dict[str, Any]:
        """What is kept with the form of step 2, by the name of the setting."""
        return {"system_prompt": self.system_prompt, "judge": self.judge, "guard": self.guard}


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
