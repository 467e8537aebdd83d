"""Step 3: what it will take, the recipe to copy, and the training as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer import recipe

from .. import charts, texts
from ..jobs import Job
from ..orders import Variant
from ..progress import Progress
from . import html


@dataclass
class TrainStep:
    """Components of the step."""

    plan: gr.HTML
    which: gr.Dropdown
    yaml: gr.Textbox
    code: gr.Textbox
    start: gr.Button
    cancel: gr.Button
    problem: gr.HTML
    status: gr.HTML
    curves: gr.HTML
    log: gr.HTML
    proceed: gr.Button

    @property
    def shown(self) -> list[Any]:
        """What [`show`] fills in."""
        return [self.status, self.curves, self.log, self.start, self.cancel, self.proceed]


def build() -> TrainStep:
    """Lay out the step."""
    gr.HTML(html.heading(texts.TRAIN_HEADING), js_on_load=None)
    plan = gr.HTML(html.panel("info", texts.NOT_CHECKED), elem_id="plan", js_on_load=None)
    with gr.Accordion(texts.RECIPES, open=False, elem_id="recipes"):
        which = gr.Dropdown([], label=texts.SHOWN_FOR, elem_id="shown-for", filterable=False)
        with gr.Row():
            yaml = _copyable(texts.RECIPE, "yaml")
            code = _copyable(texts.CODE_LABEL, "code")
    with gr.Row():
        start = gr.Button(texts.START, variant="primary", interactive=False, elem_id="start")
        cancel = gr.Button(texts.CANCEL, variant="stop", interactive=False, elem_id="cancel")
    problem = gr.HTML(elem_id="train-problem", js_on_load=None)
    status = gr.HTML(elem_id="status", js_on_load=None)
    curves = gr.HTML(elem_id="curves", js_on_load=None)
    with gr.Accordion(texts.LOG_HEADING, open=False, elem_id="log-panel"):
        log = gr.HTML(elem_id="log", js_on_load=None)
    proceed = gr.Button(texts.TO_COMPARE, variant="primary", interactive=False, elem_id="to-compare")
    return TrainStep(plan, which, yaml, code, start, cancel, problem, status, curves, log, proceed)


def _copyable(label: str, name: str) -> gr.Textbox:
    return gr.Textbox(
        label=label, elem_id=name, lines=12, max_lines=24, interactive=False, buttons=["copy"], min_width=300
    )


def planned(plan: recipe.Plan, count: int) -> Markup:
    """Say what a run will take."""
    each = html.duration(plan.seconds)
    wording = texts.PLAN_TIME if count > 1 else texts.PLAN_TIME_ONE
    values = (
        f"{plan.rows:,}",
        f"{plan.steps:,}",
        f"{plan.trainable:,} ({plan.trainable / plan.parameters:.1%})",
        html.size(plan.memory),
        wording.format(each=each, count=count),
    )
    return html.panel("good", texts.PLAN_LEAD) + html.facts(zip(texts.PLAN, values, strict=True))


def show(job: Job | None, place: int | None, *, ready: bool) -> list[Any]:
    """Return updates of `TrainStep.shown`.

    Args:
        job ([`Job`], *optional*): The newest training of the session.
        place (`int`, *optional*): How many jobs are before it.
        ready (`bool`): Whether something has been checked and can be started.
    """
    active = job is not None and not job.ended
    buttons = [
        gr.Button(interactive=ready and not active),
        gr.Button(interactive=active),
        gr.Button(interactive=job is not None and job.ended and job.progress.state == "done"),
    ]
    if job is None:
        return ["", "", "", *buttons]
    lines = Markup("<pre>{}</pre>").format("\n".join(job.progress.log))
    return [_status(job, place), _curves(job), lines, *buttons]


def _status(job: Job, place: int | None) -> Markup:
    progress = job.progress
    if progress.state == "waiting":
        waiting = texts.PLACE.format(count=place) if place and place > 1 else texts.PLACE_FIRST
        return html.panel("info", f"{texts.STATES['waiting']}. {waiting}")
    kinds = {"done": "good", "failed": "error", "cancelled": "warning", "running": "info"}
    time = html.duration(progress.seconds)
    summary = " ".join(filter(None, (f"{texts.STATES[progress.state]} ({time}).", progress.message)))
    parts = [html.panel(kinds[progress.state], summary)]
    parts += [_row(variant, progress) for variant in job.variants]
    if progress.state == "running" and progress.phase == "comparing":
        parts.append(html.working(texts.PHASES["comparing"], progress.done, progress.total))
    if progress.state == "cancelled":
        parts += [_checkpoint(job, variant) for variant in job.variants]
    return Markup('<div class="status">{}</div>').format(html.join(parts))


def _row(variant: Variant, progress: Progress) -> Markup:
    part = progress.parts.get(variant.key)
    if part is None:
        words, step, total = texts.STATES["waiting" if not progress.ended else "cancelled"], 0, 1
    elif part.state == "running":
        left = progress.seconds_left()
        words = texts.PHASES[progress.phase]
        if part.step:
            words = texts.STEP_OF.format(step=part.step, total=part.total)
        if left is not None:
            words += f", {texts.TIME_LEFT.format(time=html.duration(left))}"
        step, total = part.step, part.total or 1
    else:
        words, step, total = texts.STATES[part.state], part.step, part.total or 1
        words = f"{words}: {part.message}" if part.message else words
    return Markup(
        '<div class="run"><strong>{}</strong><progress max="{}" value="{}" aria-label="{}"></progress>'
        "<span>{}</span></div>"
    ).format(variant.title, total, step, variant.title, words)


def _checkpoint(job: Job, variant: Variant) -> Markup:
    part = job.progress.parts.get(variant.key)
    if part is None or part.state != "cancelled" or not part.step:
        return Markup("")
    return Markup('<p>{} <a href="download/{}/{}/checkpoint" download>{}</a></p>').format(
        texts.CHECKPOINT_KEPT.format(step=part.step), job.id, variant.key, texts.DOWNLOAD["checkpoint"]
    )


def _curves(job: Job) -> Markup:
    """Draw what the variants have in common: each picture one measure, each line one variant."""
    last = max((part.total for part in job.progress.parts.values()), default=0)
    drawn = [
        charts.lines(title, _lines(job, name, factor), last, top=100 if factor == 100 else None)
        for name, title, factor in (
            ("refused harmful", texts.CHART_REFUSED, 100),
            ("refused borderline", texts.CHART_BORDERLINE, 100),
            ("loss", texts.CHART_LOSS, 1),
            ("penalty", texts.CHART_PENALTY, 1),
        )
    ]
    if not any(drawn):
        return html.panel("info", texts.CHART_EMPTY) if job.progress.state == "running" else Markup("")
    return Markup('<div class="charts">{}</div>').format(html.join(drawn))


def _lines(job: Job, name: str, factor: float) -> list[charts.Line]:
    found = []
    for number, variant in enumerate(job.variants):
        part = job.progress.parts.get(variant.key)
        curve = list(part.curves.get(name, ())) if part is not None else []
        if curve:
            found.append(charts.Line(variant.title, number, [(step, factor * value) for step, value in curve]))
    return found
