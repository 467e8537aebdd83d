"""Step 4: what became of the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer import Comparison

from .. import charts, texts
from ..jobs import Job
from ..limits import Setup
from . import html

OUTCOMES = {"harmful": "refused", "benign": "complied", "borderline": "complied", "task": "correct"}
SHOWN_FLIPS = 12
OUTPUTS = 5
"""How many updates [`show`] returns."""


@dataclass
class CompareStep:
    """Components of the step."""

    result: gr.HTML
    question: gr.Textbox
    whom: gr.CheckboxGroup
    ask: gr.Button
    stop: gr.Button
    answers: gr.HTML
    downloads: gr.HTML
    which: gr.Dropdown
    repository: gr.Textbox
    push: gr.Button
    pushed: gr.HTML

    @property
    def shown(self) -> list[Any]:
        """What [`show`] fills in."""
        return [self.result, self.whom, self.downloads, self.which, self.push]


def build(setup: Setup) -> CompareStep:
    """Lay out the step."""
    limit = setup.limits.question
    gr.HTML(html.heading(texts.COMPARE_HEADING), js_on_load=None)
    result = gr.HTML(html.panel("info", texts.NO_COMPARISON), elem_id="result", js_on_load=None)
    gr.HTML(html.subheading(texts.ASK_HEADING), js_on_load=None)
    whom = gr.CheckboxGroup([], label=texts.ASK_WHOM, elem_id="whom")
    question = gr.Textbox(
        label=texts.ASK_LABEL, placeholder=texts.ASK_HINT, max_length=limit, elem_id="question", submit_btn=False
    )
    with gr.Row():
        ask = gr.Button(texts.ASK_BUTTON, variant="primary", elem_id="ask")
        stop = gr.Button(texts.ASK_STOP, elem_id="ask-stop")
    answers = gr.HTML(elem_id="answers", js_on_load=None)
    downloads = gr.HTML(elem_id="downloads", js_on_load=None)
    return CompareStep(result, question, whom, ask, stop, answers, downloads, *_build_push(setup))


def _build_push(setup: Setup) -> tuple[gr.Dropdown, gr.Textbox, gr.Button, gr.HTML]:
    with gr.Accordion(texts.PUSH, open=False, visible=setup.push or setup.space, elem_id="push-panel"):
        if setup.space and "OAUTH_CLIENT_ID" in os.environ:
            gr.LoginButton()
        with gr.Row():
            which = gr.Dropdown([], label=texts.PUSH_WHICH, elem_id="push-which", filterable=False)
            repository = gr.Textbox(label=texts.PUSH_REPO, max_length=200, elem_id="push-repo")
        push = gr.Button(texts.PUSH_BUTTON, interactive=False, elem_id="push")
        pushed = gr.HTML(elem_id="pushed", js_on_load=None)
    return which, repository, push, pushed


def show(job: Job | None, titles: list[str]) -> list[Any]:
    """Return updates of `CompareStep.shown`.

    Args:
        job ([`Job`], *optional*): The newest training of the session.
        titles (`list[str]`): Variants that can be asked.
    """
    comparison = job.comparison() if job is not None and job.ended else None
    whom = gr.CheckboxGroup(choices=titles, value=titles)
    push = gr.Button(interactive=bool(titles))
    which = gr.Dropdown(choices=titles, value=titles[-1] if titles else None)
    if job is None or comparison is None:
        return [html.panel("info", texts.NO_COMPARISON), whom, "", which, push]
    return [described(comparison, embedded=job.model.embedded), whom, _downloads(job), which, push]


def described(comparison: Comparison, *, embedded: bool) -> Markup:
    """Tell a comparison: verdicts, the table, the picture, categories and what changed."""
    parts = [_verdicts(comparison), _rates(comparison), _plane(comparison)]
    if embedded:
        parts.insert(1, html.panel("info", texts.TINY))
    parts += [_categories(comparison), _flips(comparison)]
    return Markup('<div class="comparison">{}</div>').format(html.join(parts))


def _verdicts(comparison: Comparison) -> Markup:
    kinds = {"eroded": "error", "kept": "good", "improved": "good"}
    parts = []
    for evaluation in comparison.evaluations[1:]:
        found = comparison.verdict(evaluation.name)
        details = html.join(Markup("<li>{}</li>").format(line) for line in found.details)
        parts.append(
            Markup('<section class="verdict {}"><h3>{}: <span>{}</span></h3><p>{}</p><ul>{}</ul></section>').format(
                kinds.get(found.level, "warning"), evaluation.name, texts.WORDS[found.level], found.headline, details
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


def _plane(comparison: Comparison) -> Markup:
    """Draw refusals of harm over the task, or over borderline help where there is no task."""
    kind, across = "task", texts.PLANE_TASK
    if not comparison.before.of_kind("task"):
        kind, across = "borderline", texts.PLANE_HELP
    if not comparison.before.of_kind("harmful") or not comparison.before.of_kind(kind):
        return Markup("")
    dots = []
    for number, evaluation in enumerate(comparison.evaluations):
        up = evaluation.of_kind("harmful")[0].rate("refused")
        right = evaluation.of_kind(kind)[0].rate(OUTCOMES[kind])
        # The colours of the variants are those of their curves; the model before has the last one.
        rates = (100 * rate for rate in (right.value, up.value, up.low, up.high))
        dots.append(charts.Dot(evaluation.name, (number - 1) % charts.COLOURS, *rates))
    picture = charts.plane(texts.PLANE_HEADING, across, texts.PLANE_UP, dots)
    return Markup('<div class="charts">{}</div><p class="hint">{}</p>').format(picture, texts.PLANE_HINT)


def _categories(comparison: Comparison) -> Markup:
    harmful = comparison.before.of_kind("harmful")
    names = list(harmful[0].by_category("refused")) if harmful else []
    if not names:
        return Markup("")
    rows = [
        [name, *(html.rate(e.of_kind("harmful")[0].rate("refused", category=name)) for e in comparison.evaluations)]
        for name in names
    ]
    head = [texts.CATEGORY, *(e.name for e in comparison.evaluations)]
    return html.folded(texts.CATEGORIES_HEADING, html.table(texts.CATEGORIES_HEADING, head, rows))


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
    rows = [
        Markup("<li><strong>{}</strong> {}</li>").format(
            variant.title,
            html.join(
                Markup('<a href="download/{}/{}/{}" download>{}</a> ').format(
                    job.id, variant.key, kind, texts.DOWNLOAD[kind]
                )
                for kind in ("adapter", "recipe")
            ),
        )
        for variant in job.variants
        if (part := job.progress.parts.get(variant.key)) and part.state == "done"
    ]
    both = html.join(
        Markup('<a href="download/{}/all/{}" download>{}</a> ').format(job.id, kind, texts.DOWNLOAD[kind])
        for kind in ("report", "numbers")
    )
    rows.append(Markup("<li><strong>{}</strong> {}</li>").format(texts.ALL_MODELS, both))
    return Markup('<section class="downloads"><h3>{}</h3><ul>{}</ul></section>').format(
        texts.DOWNLOADS, html.join(rows)
    )
