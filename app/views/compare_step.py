"""Step 4: what became of the model."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer import Comparison

from .. import texts
from ..actions import adapters
from ..jobs import Job
from ..sessions import Session
from ..setup import Setup
from . import html

OUTCOMES = {"harmful": "refused", "benign": "complied", "borderline": "complied", "task": "correct"}
KINDS = {"eroded": "error", "kept": "good", "improved": "good"}
SHOWN_FLIPS = 12


class CompareStep:
    """The step's layout, and its updates."""

    def __init__(self, setup: Setup) -> None:
        limit = setup.limits.question
        gr.Markdown(f"## {texts.COMPARE_HEADING}")
        self.run = gr.Dropdown([], label=texts.RUNS, visible=False, elem_id="run", filterable=False)
        self.result = gr.HTML(html.panel("info", texts.NO_COMPARISON), elem_id="result", js_on_load=None)
        self.details = gr.HTML(elem_id="details", js_on_load=None)
        with gr.Column(visible=False) as self.trying:
            gr.Markdown(f"### {texts.ASK_HEADING}")
            self.whom = gr.CheckboxGroup([texts.BEFORE], label=texts.ASK_WHOM, elem_id="whom")
            self.question = gr.Textbox(
                label=texts.ASK_LABEL, placeholder=texts.ASK_HINT, max_length=limit, elem_id="question"
            )
            with gr.Row(elem_classes="actions"):
                self.ask = gr.Button(texts.ASK_BUTTON, variant="primary", elem_id="ask")
                self.stop = gr.Button(texts.ASK_STOP, elem_id="ask-stop")
            self.answers = gr.HTML(elem_id="answers", js_on_load=None)
        self.downloads = gr.HTML(elem_id="downloads", js_on_load=None)
        with gr.Accordion(texts.RUN_HISTORY, open=False, visible=False, elem_id="history") as self.history:
            self.name = gr.Textbox(label=texts.RUN_NAME, max_length=200, elem_id="run-name")
            with gr.Row(elem_classes="actions"):
                self.rename = gr.Button(texts.RENAME, elem_id="rename")
                self.delete = gr.Button(texts.DELETE, variant="stop", elem_id="delete")

    def show(self, session: Session) -> dict[Any, Any]:
        """Return updates that show the run that the user has chosen, or the newest."""
        job = session.compared
        comparison = job.comparison() if job is not None else None
        titles = list(adapters(job)) if job is not None else []
        runs = [(one.label, one.id) for one in session.finished]
        everybody = [texts.BEFORE, *titles]
        shown = {
            self.run: gr.Dropdown(choices=runs, value=job.id if job else None, visible=len(runs) > 1),
            self.trying: gr.Column(visible=comparison is not None),
            self.whom: gr.CheckboxGroup(choices=everybody, value=everybody),
            self.history: gr.Accordion(visible=job is not None),
            self.name: job.name if job else "",
        }
        if job is None or comparison is None:
            empty = html.panel("info", texts.NO_COMPARISON)
            return shown | {self.result: empty, self.details: "", self.downloads: ""}
        older = session.choices is not None and (session.stale or job.choices is not session.choices)
        note = html.panel("warning", texts.OLDER_RUN.format(name=job.label)) if older else Markup("")
        return shown | {
            self.result: note + described(comparison, embedded=job.model.embedded),
            self.details: _flips(comparison),
            self.downloads: _downloads(job),
        }


def described(comparison: Comparison, *, embedded: bool) -> Markup:
    """Say what became of the model: verdicts first, then the rates."""
    parts = [_verdicts(comparison), _rates(comparison)]
    if embedded:
        parts.insert(1, html.panel("info", texts.TINY))
    return Markup('<div class="comparison">{}</div>').format(html.join(parts))


def _verdicts(comparison: Comparison) -> Markup:
    parts = []
    for evaluation in comparison.evaluations[1:]:
        found = comparison.verdict(evaluation.name)
        details = html.join(Markup("<li>{}</li>").format(line) for line in found.details)
        parts.append(
            Markup('<section class="verdict {}"><h3>{}: <span>{}</span></h3><p>{}</p><ul>{}</ul></section>').format(
                KINDS.get(found.level, "warning"), evaluation.name, texts.WORDS[found.level], found.headline, details
            )
        )
    return Markup('<div class="verdicts">{}</div>').format(html.join(parts))


def _rates(comparison: Comparison) -> Markup:
    rows = []
    for evaluation in comparison.evaluations:
        cells = []
        for kind, outcome in OUTCOMES.items():
            results = evaluation.of_kind(kind)
            cells.append(html.rate(results[0].rate(outcome)) if results else Markup(texts.NOT_MEASURED))
        rows.append([evaluation.name, *cells])
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


def answered(answers: dict[str, str], waiting: bool) -> Markup:
    """Show answers side by side; all of them are text and nothing else."""
    columns = html.join(
        Markup('<section><h4>{}</h4><p class="answer">{}</p></section>').format(title, text)
        for title, text in answers.items()
    )
    state = html.panel("info", texts.ASK_BUSY) if waiting and not any(answers.values()) else Markup("")
    return Markup('{}<div class="answers" aria-live="polite">{}</div>').format(state, columns)


def _downloads(job: Job) -> Markup:
    done = set(adapters(job))
    rows = [
        Markup("<li><strong>{}</strong> {}</li>").format(variant.title, html.download(job.id, variant.key, "adapter"))
        for variant in job.variants
        if variant.title in done
    ]
    both = html.join(html.download(job.id, "all", kind) for kind in ("report", "numbers", "recipes"))
    rows.append(Markup("<li><strong>{}</strong> {}</li>").format(texts.ALL_MODELS, both))
    return Markup('<section class="downloads"><h3>{}</h3><ul>{}</ul></section>').format(
        texts.DOWNLOADS, html.join(rows)
    )
