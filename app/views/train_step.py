"""Step 3: what it will take, the recipe to copy, and the training as it goes."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
import pandas as pd  # type: ignore[import-untyped]
from markupsafe import Markup

from safe_trainer import recipe

from .. import texts
from ..jobs import Job
from ..progress import Progress
from ..recipes import Variant
from ..sessions import Session
from . import html

LOW_START = 0.5
"""Share of harmful prompts refused at the start below which there is little to protect."""


class TrainStep:
    """The step's layout, and its updates."""

    def __init__(self) -> None:
        gr.Markdown(f"## {texts.TRAIN_HEADING}")
        self.plan = gr.HTML(html.panel("info", texts.NOT_CHECKED), elem_id="plan", js_on_load=None)
        with gr.Row(elem_classes="actions"):
            self.start = gr.Button(texts.START, variant="primary", interactive=False, elem_id="start")
            self.cancel = gr.Button(texts.CANCEL, variant="stop", interactive=False, elem_id="cancel")
            self.go_on = gr.Button(texts.GO_ON, visible=False, elem_id="go-on")
            self.proceed = gr.Button(texts.TO_COMPARE, interactive=False, elem_id="to-compare")
        self.problem = gr.HTML(elem_id="train-problem", js_on_load=None)
        self.status = gr.HTML(elem_id="status", js_on_load=None)
        with gr.Row(elem_id="curves"):
            self.curves = {name: _plot(name, *titles) for name, titles in texts.CURVES.items()}
        with gr.Accordion(texts.RECIPES, open=False, elem_id="recipes"):
            self.recipes = gr.HTML(elem_id="yaml", js_on_load=None)
        with gr.Accordion(texts.LOG_HEADING, open=False, elem_id="log-panel"):
            self.log = gr.HTML(elem_id="log", js_on_load=None)

    def show_plan(self, session: Session) -> dict[Any, Any]:
        """Return updates of what was checked."""
        draft = session.draft
        if draft is None or draft.plan is None:
            return {self.plan: "" if session.job("train") else html.panel("info", texts.NOT_CHECKED)}
        if session.stale:
            return {self.plan: html.panel("warning", texts.STALE)}
        written = [
            html.folded(one.title, Markup("<pre>{}</pre>").format((draft.folder / one.recipe).read_text("utf-8")))
            for one in draft.variants
        ]
        archive = Markup("<p>{}</p>").format(html.download(draft.id, "all", "recipes"))
        return {self.plan: planned(draft.plan, len(written)), self.recipes: archive + html.join(written)}

    def show(self, session: Session, place: int | None, *, curves: bool = True) -> dict[Any, Any]:
        """Return updates of the newest training."""
        job = session.job("train")
        active = job is not None and not job.ended
        done = job is not None and job.progress.state == "done"
        ready = session.draft is not None and not session.stale and not session.busy
        fresh = done and job is not None and job.draft is session.draft
        shown = {
            self.start: gr.Button(interactive=ready, variant="secondary" if fresh else "primary"),
            self.cancel: gr.Button(interactive=active),
            self.go_on: gr.Button(visible=job is not None and job.can_go_on, interactive=not session.busy),
            self.proceed: gr.Button(interactive=done, variant="primary" if fresh else "secondary"),
            self.status: _status(job, place) if job is not None else "",
        }
        if not curves:
            return shown
        log = Markup("<pre>{}</pre>").format("\n".join(job.progress.log if job is not None else ()))
        return shown | {self.log: log} | {plot: _curve(job, name) for name, plot in self.curves.items()}


def _plot(name: str, title: str, axis: str) -> gr.LinePlot:
    limits = [0, 100] if "%" in axis else None
    return gr.LinePlot(
        x="step",
        y="value",
        color="run",
        title=title,
        x_title=texts.STEP_AXIS,
        y_title=axis,
        color_title=" ",
        y_lim=limits,
        visible=False,
        elem_id=f"curve-{name}",
        buttons=[],
        min_width=300,
    )


def _curve(job: Job | None, name: str) -> Any:
    """Draw what the variants have in common: each picture one measure, each line one variant."""
    factor = 100 if "%" in texts.CURVES[name][1] else 1
    parts = {v.title: job.progress.parts.get(v.key) for v in job.variants} if job is not None else {}
    found = {title: part.curves.get(name) if part is not None else None for title, part in parts.items()}
    # The plot keeps the names that it is first given, so those without a point yet are among them.
    points = [
        (step, factor * value, title) for title, curve in found.items() for step, value in curve or [(0, math.nan)]
    ]
    if not any(found.values()):  # a plot that was shown is hidden, not removed: it still looks for its place
        return gr.LinePlot(visible="hidden" if job is not None else False)
    return gr.LinePlot(pd.DataFrame(points, columns=["step", "value", "run"]), visible=True)


def planned(plan: recipe.Plan, count: int) -> Markup:
    """Say what a run will take."""
    each = html.duration(plan.seconds)
    time = (texts.PLAN_TIME if count > 1 else texts.PLAN_TIME_ONE).format(each=each, count=count)
    weights = f"{plan.trainable:,} ({plan.trainable / plan.parameters:.2%})"
    values = (f"{plan.rows:,}", f"{plan.steps:,}", weights, html.size(plan.memory), time)
    warnings = html.join(html.panel("warning", message) for message in plan.messages)
    return html.panel("good", texts.PLAN_LEAD) + warnings + html.facts(zip(texts.PLAN, values, strict=True))


def _status(job: Job, place: int | None) -> Markup:
    progress = job.progress
    if progress.state == "waiting":
        words = texts.PLACE_FIRST if not place else texts.PLACE if place == 1 else texts.PLACES.format(count=place)
        return html.panel("info", words)
    kinds = {"done": "good", "failed": "error", "cancelled": "warning", "running": "info"}
    used = texts.MEMORY.format(size=html.size(progress.memory)) if progress.memory else ""
    spent = ", ".join(filter(None, (html.duration(progress.seconds), used)))
    more = texts.CAN_GO_ON if job.can_go_on else ""
    summary = " ".join(filter(None, (f"{texts.STATES[progress.state]} ({spent}).", progress.message, more)))
    parts = [html.panel(kinds[progress.state], summary)]
    parts += [_start(progress), *(_row(variant, progress) for variant in job.variants)]
    if progress.state == "running" and progress.phase == "comparing":
        parts.append(html.working(texts.PHASES["comparing"], progress.done, progress.total))
    return Markup('<div class="status">{}</div>').format(html.join(parts))


def _start(progress: Progress) -> Markup:
    """Say how much there is to protect."""
    start = progress.start_rate()
    if start is None:
        return Markup("")
    words = texts.START_RATE.format(refused=start)
    return html.panel("info", words) if start >= LOW_START else html.panel("warning", f"{words} {texts.START_LOW}")


def _row(variant: Variant, progress: Progress) -> Markup:
    part = progress.parts.get(variant.key)
    step, total = (part.step, part.total or 1) if part is not None else (0, 1)
    if part is None:
        words = texts.STATES["cancelled" if progress.ended else "waiting"]
    elif part.state == "running":
        left = progress.seconds_left()
        words = texts.PHASES.get(progress.phase, progress.phase)
        if part.step and progress.phase == "training":
            words = texts.STEP_OF.format(step=part.step, total=part.total)
        if left is not None:
            words += f", {texts.TIME_LEFT.format(time=html.duration(left))}"
    else:
        words = f"{texts.STATES[part.state]}: {part.message}" if part.message else texts.STATES[part.state]
    return Markup(
        '<div class="run"><strong>{}</strong><progress max="{}" value="{}" aria-label="{}"></progress>'
        "<span>{}</span></div>"
    ).format(variant.title, total, step, variant.title, words)
