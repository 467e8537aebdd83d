"""The page: four steps, and which handler answers to what."""

from __future__ import annotations

from functools import partial

import gradio as gr

from . import texts
from .actions import Services
from .handlers import COMPARE, DATA, METHOD, TRAIN, Handlers
from .views import compare_step, data_step, html, method_step, train_step


class Page:
    """The page of an app.

    Args:
        services ([`Services`]): What can be done on it.
    """

    def __init__(self, services: Services) -> None:
        self.handlers = Handlers(services)
        with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.HTML(html.title(texts.TITLE, texts.LEAD), js_on_load=None)
            with gr.Walkthrough(selected=DATA, elem_id="steps") as self.steps:
                with gr.Step(texts.STEPS[0], id=DATA):
                    self.data = data_step.build(services.setup)
                with gr.Step(texts.STEPS[1], id=METHOD):
                    self.method = method_step.build()
                with gr.Step(texts.STEPS[2], id=TRAIN):
                    self.train = train_step.build()
                with gr.Step(texts.STEPS[3], id=COMPARE):
                    self.compare = compare_step.build(services.setup)
            self.timer = gr.Timer(0.7)
            self.seen = gr.State("")
            self._connect_data()
            self._connect_training()
            self._connect_comparing()

    def _connect_data(self) -> None:
        data, do, outputs = self.data, self.handlers, [*self.data.shown, *self.method.shown]
        for key, button in data.examples.items():
            button.click(do.example(key), None, outputs, api_name=f"example_{key}")
        data.upload.upload(do.upload, data.upload, [data.upload, *outputs], api_name="upload")
        data.model.input(do.choose_model, data.model, [data.other, *outputs], api_name="model")
        data.use_other.click(do.name_model, [data.other_id, data.unaligned_id], outputs, api_name="other_model")
        data.scan.click(do.scan, None, [data.ranking, self.timer], api_name="scan")
        data.proceed.click(partial(gr.Walkthrough, selected=METHOD), None, self.steps, api_visibility="private")

    def _connect_training(self) -> None:
        method, train, do = self.method, self.train, self.handlers
        method.check.click(
            do.check,
            [self.data.skip_bad, *method.shown],
            [self.steps, method.problem, train.plan, train.which, train.yaml, train.code, *train.shown],
            api_name="check",
        )
        train.which.input(do.recipe, train.which, [train.yaml, train.code], api_visibility="private")
        changed = [train.problem, *train.shown, self.timer]
        train.start.click(do.start, None, changed, api_name="start")
        train.cancel.click(do.cancel, None, changed, api_name="cancel", queue=False)
        self.timer.tick(
            do.tick,
            self.seen,
            [self.seen, self.timer, self.data.ranking, *train.shown, *self.compare.shown],
            show_progress="hidden",
            queue=False,
            api_name="tick",
        )

    def _connect_comparing(self) -> None:
        train, compare, do = self.train, self.compare, self.handlers
        train.proceed.click(partial(gr.Walkthrough, selected=COMPARE), None, self.steps, api_visibility="private")
        asking = gr.on(
            [compare.ask.click, compare.question.submit],
            do.ask,
            [compare.question, compare.whom],
            compare.answers,
            show_progress="hidden",
            concurrency_limit=8,
            api_name="ask",
        )
        compare.stop.click(None, None, None, cancels=[asking])
        setup = self.handlers.services.setup
        if setup.push or setup.space:
            push = do.push if setup.push else do.push_as_user
            compare.push.click(push, [compare.which, compare.repository], compare.pushed, api_name="push")
        shown = [*self.data.shown, *self.method.shown, self.timer, self.data.ranking]
        self.blocks.load(
            do.load,
            None,
            [self.steps, *shown, *train.shown, *compare.shown],
            show_progress="hidden",
            api_name="load",
        )
