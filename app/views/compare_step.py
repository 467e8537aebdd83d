"""Step 4: what became of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer import Comparison

from .. import texts
from ..answering import Turn
from ..jobs import Job
from ..recipes import differences
from ..sessions import Session
from ..setup import Setup
from . import html
from .review import ReviewPanel

OUTCOMES = {"harmful": "refused", "benign": "complied", "borderline": "complied", "task": "correct"}
KINDS = {"eroded": "error", "kept": "good", "improved": "good"}
SHOWN_FLIPS = 12


class CompareStep:
    """The step's layout, and its updates."""

    def __init__(self, setup: Setup) -> None:
        limit = setup.limits.question
        gr.Markdown(f"## {texts.COMPARE_HEADING}")
        with gr.Row():
            self.run = gr.Dropdown([], label=texts.RUNS, visible=False, elem_id="run", filterable=False)
            self.other = gr.Dropdown([], label=texts.OTHER_RUN, visible=False, elem_id="other-run", filterable=False)
        self.result = gr.HTML(html.panel("info", texts.NO_COMPARISON), elem_id="result", js_on_load=None)
        self.details = gr.HTML(elem_id="details", js_on_load=None)
        self.review = ReviewPanel()
        with gr.Column(visible=False) as self.trying:
            gr.Markdown(f"### {texts.ASK_HEADING}")
            self.whom = gr.CheckboxGroup([texts.BEFORE], label=texts.ASK_WHOM, elem_id="whom")
            self.talk = gr.State([])
            self.answers = gr.HTML(elem_id="answers", js_on_load=None)
            self.question = gr.Textbox(
                label=texts.ASK_LABEL, placeholder=texts.ASK_HINT, max_length=limit, elem_id="question"
            )
            with gr.Row(elem_classes="actions"):
                self.ask = gr.Button(texts.ASK_BUTTON, variant="primary", elem_id="ask")
                self.stop = gr.Button(texts.ASK_STOP, elem_id="ask-stop")
                self.fresh = gr.Button(texts.ASK_NEW, elem_id="ask-new")
            with gr.Accordion(texts.ASK_MORE, open=False, elem_id="ask-options"):
                self.system = gr.Textbox("", label=texts.ASK_SYSTEM, max_length=limit, lines=2, elem_id="ask-system")
                self.temperature = gr.Slider(
                    0,
                    2,
                    0,
                    step=0.1,
                    label=texts.ASK_TEMPERATURE,
                    info=texts.ASK_TEMPERATURE_INFO,
                    elem_id="ask-temperature",
                )
        self.downloads = gr.HTML(elem_id="downloads", js_on_load=None)
        with gr.Accordion(texts.RUN_HISTORY, open=False, visible=False, elem_id="history") as self.history:
            self.list = gr.HTML(elem_id="runs", js_on_load=None)
            self.name = gr.Textbox(label=texts.RUN_NAME, max_length=200, max_lines=1, elem_id="run-name")
            with gr.Row(elem_classes="actions"):
                self.rename = gr.Button(texts.RENAME, elem_id="rename")
                self.delete = gr.Button(texts.DELETE, elem_id="delete")
                self.sure = gr.Button(texts.DELETE_SURE, variant="stop", visible=False, elem_id="delete-sure")
                self.keep = gr.Button(texts.DELETE_KEEP, visible=False, elem_id="delete-keep")

    def show(self, session: Session) -> dict[Any, Any]:
        """Return updates that show the run that the user has chosen, or the newest."""
        job, other = session.compared, session.job_called(session.beside)
        comparison = job.comparison() if job is not None else None
        everybody = [texts.BEFORE, *(job.adapters if job is not None else ())]
        runs = [(one.label, one.id) for one in session.runs]
        others = [(texts.NO_OTHER, ""), *(run for run in runs if job is not None and run[1] != job.id)]
        shown = {
            self.run: gr.Dropdown(choices=runs, value=job.id if job else None, visible=len(runs) > 1),
            self.other: gr.Dropdown(choices=others, value=other.id if other else "", visible=len(runs) > 1),
            self.trying: gr.Column(visible=comparison is not None),
            self.whom: gr.CheckboxGroup(choices=everybody, value=everybody),
            self.history: gr.Accordion(visible=bool(runs)),
            self.list: _history(session.runs),
            self.name: gr.Textbox(placeholder=job.name if job else ""),  # and what is being typed there stays
            **self.asked_to_delete(False),
            **self.review.show(session),
        }
        if job is None or comparison is None:
            return shown | {self.result: _not_finished(job), self.details: "", self.downloads: ""}
        older = session.draft is not None and (session.stale or job.draft is not session.draft)
        note = html.panel("warning", texts.OLDER_RUN.format(name=job.label)) if older else Markup("")
        second = other.comparison() if other is not None else None
        both = {job.label: comparison} | ({other.label: second} if other is not None and second else {})
        told = described(both, embedded=job.model.embedded)
        if other is not None:
            told += _not_finished(other) if second is None else _differences(job, other, both)
        return shown | {self.result: note + told, self.details: _flips(comparison), self.downloads: _downloads(job)}

    def asked_to_delete(self, asked: bool) -> dict[Any, Any]:
        """Return updates that ask whether to delete the run, or stop asking."""
        shown = {self.delete: not asked, self.sure: asked, self.keep: asked}
        return {button: gr.Button(visible=visible) for button, visible in shown.items()}

    def hushed(self, session: Session) -> dict[Any, Any]:
        """Return updates that end a conversation: the models that are shown are others now."""
        return {self.talk: [], self.answers: "", **self.unnamed(session)}

    def unnamed(self, session: Session) -> dict[Any, Any]:
        """Return an update that empties the new name: it has been given, or another run is shown now."""
        return {self.name: gr.Textbox("", placeholder=session.compared.name if session.compared else "")}


def _not_finished(job: Job | None) -> Markup:
    if job is None:
        return html.panel("info", texts.NO_COMPARISON)
    state = texts.STATES[job.progress.state]
    return html.panel("info", texts.NOT_FINISHED.format(state=state, message=job.progress.message))


def _history(runs: list[Job]) -> Markup:
    rows = []
    for job in runs:
        if job.verdicts is None and job.progress.state == "done":
            job.comparison()
        words = {title: texts.WORDS[level] for title, level in (job.verdicts or {}).items()}
        words = words or {v.title: texts.STATES[job.progress.state] for v in job.variants}
        lines = html.join(Markup("<div>{}: {}</div>").format(*pair) for pair in words.items())
        rows.append([job.name, job.when, lines, html.download(job.id, "all", "recipes")])
    return html.table(texts.RUN_LIST, texts.RUN_COLUMNS, rows)


def _differences(job: Job, other: Job, both: dict[str, Comparison]) -> Markup:
    """Say in what two runs differ, as far as their recipes say so."""
    asked = [[result.prompt_set for result in one.before.results] for one in both.values()]
    alike = asked[0] == asked[1] and job.model == other.model
    rows = differences(*(one.folder / one.variants[0].recipe for one in (job, other)))
    table = html.table(texts.DIFFERENT, [texts.SETTING_COLUMN, *both], rows)
    found = table if rows else html.panel("info", texts.NO_DIFFERENCE)
    return found if alike else html.panel("warning", texts.OTHER_PROMPTS) + found


def described(runs: Mapping[str, Comparison], *, embedded: bool) -> Markup:
    """Say what became of the models of one run, or of two: verdicts first, then the rates."""
    named = [(f"{label}: " if len(runs) > 1 else "", comparison) for label, comparison in runs.items()]
    parts = [html.join(_verdicts(*one) for one in named), html.join(_notes(one) for one in runs.values())]
    parts += [html.panel("info", texts.TINY)] if embedded else []
    parts.append(_rates(named))
    return Markup('<div class="comparison">{}</div>').format(html.join(parts))


def _notes(comparison: Comparison) -> Markup:
    return html.join(html.panel("info", note) for note in comparison.notes)


def _verdicts(run: str, comparison: Comparison) -> Markup:
    parts = []
    for evaluation in comparison.evaluations[1:]:
        found = comparison.verdict(evaluation.name)
        details = html.join(Markup("<li>{}</li>").format(line) for line in found.details)
        parts.append(
            Markup('<section class="verdict {}"><h3>{}{}: <span>{}</span></h3><p>{}</p><ul>{}</ul></section>').format(
                KINDS.get(found.level, "warning"),
                run,
                evaluation.name,
                texts.WORDS[found.level],
                found.headline,
                details,
            )
        )
    return Markup('<div class="verdicts">{}</div>').format(html.join(parts))


def _rates(runs: list[tuple[str, Comparison]]) -> Markup:
    rows = []
    for run, evaluation in ((run, one) for run, comparison in runs for one in comparison.evaluations):
        cells = []
        for kind, outcome in OUTCOMES.items():
            asked = bool(evaluation.of_kind(kind))
            cells.append(html.rate(evaluation.pooled(outcome, kind)) if asked else Markup(texts.NOT_MEASURED))
        rows.append([f"{run}{evaluation.name}", *cells])
    return html.table(texts.TABLE_CAPTION, [texts.MODEL_COLUMN, *texts.TABLE_COLUMNS.values()], rows)


def _flips(comparison: Comparison) -> Markup:
    parts = []
    for evaluation in comparison.evaluations[1:]:
        for result in comparison.before.results:
            found = comparison.flips(evaluation.name, result.prompt_set.name)
            if not found:
                continue
            rows = [
                [
                    html.short(flip.prompt),
                    f"{flip.outcome_before} → {flip.outcome_after}",
                    html.short(flip.before.text),
                    html.short(flip.after.text),
                ]
                for flip in found[:SHOWN_FLIPS]
            ]
            title = f"{evaluation.name}, {result.prompt_set.name}"
            table = html.table(title, texts.FLIP_COLUMNS, rows)
            shown = html.hidden(texts.REVEAL, table) if result.prompt_set.kind == "harmful" else table
            count = texts.FLIPS_SHOWN if len(found) > len(rows) else texts.FLIPS_ALL
            parts.append(html.folded(f"{title}: {count.format(count=len(found), shown=len(rows))}", shown))
    return html.folded(texts.FLIPS_HEADING, html.join(parts) or html.panel("info", texts.NO_FLIPS))


def answered(talk: list[Turn], waiting: bool) -> Markup:
    """Show a conversation, its answers side by side, each under its model's name; all of it is text and no more."""
    turns = []
    for turn in talk:
        columns = html.join(
            Markup('<section class="{}"><h4>{} <span>{}</span></h4><p class="answer">{}</p></section>').format(
                *(("before", title, texts.TAG_BEFORE) if title == texts.BEFORE else ("after", title, texts.TAG_AFTER)),
                text or (texts.ASK_BUSY if waiting else texts.ASK_EMPTY),
            )
            for title, text in turn.answers.items()
        )
        asked = Markup('<p class="question"><b>{}</b> {}</p>').format(texts.ASK_YOU, turn.question)
        turns.append(Markup('{}<div class="answers">{}</div>').format(asked, columns))
    state = html.panel("info", texts.ASK_BUSY) if waiting and talk and not talk[-1].answers else Markup("")
    return Markup('<div aria-live="polite">{}{}</div>').format(html.join(turns), state)


def _downloads(job: Job) -> Markup:
    rows = []
    for variant in job.variants:
        if variant.title in job.adapters:
            links = html.join(html.download(job.id, variant.key, kind) for kind in ("adapter", "merged", "card"))
            rows.append(Markup("<li><strong>{}</strong> {}</li>").format(variant.title, links))
    both = html.join(html.download(job.id, "all", kind) for kind in ("report", "numbers", "recipes"))
    rows.append(Markup("<li><strong>{}</strong> {}</li>").format(texts.ALL_MODELS, both))
    return Markup('<section class="downloads"><h3>{}</h3><ul>{}</ul></section>').format(
        texts.DOWNLOADS, html.join(rows)
    )
