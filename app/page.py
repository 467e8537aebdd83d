"""The page: four steps, and what happens when something is pressed on it.

Each handler is given the session that asks, does one thing, and returns updates for the components that change.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from . import texts
from .actions import Services, changed
from .answering import Turn
from .inspection import Sample
from .materials import SAID
from .sessions import COOKIE, Session
from .views import html
from .views.compare_step import CompareStep, answered
from .views.data_step import OTHER, DataStep, samples
from .views.method_step import MethodStep
from .views.train_step import TrainStep

logger = logging.getLogger(__name__)

DATA, METHOD, TRAIN, COMPARE = range(1, 5)
Updates = dict[Any, Any]


class Page:
    """The page of an app."""

    def __init__(self, services: Services) -> None:
        self.services = services
        with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(f"# {texts.TITLE}\n{texts.LEAD}")
            with gr.Tabs(selected=DATA, elem_id="steps", overflow_behavior="wrap") as self.steps:
                with gr.Tab(texts.STEPS[0], id=DATA, elem_id="step-data", render_children=True):
                    self.data = DataStep(services.setup)
                with gr.Tab(texts.STEPS[1], id=METHOD, interactive=False, render_children=True) as self.to_method:
                    self.method = MethodStep(services.setup, {"skip_bad": self.data.skip_bad})
                with gr.Tab(texts.STEPS[2], id=TRAIN, interactive=False, render_children=True) as self.to_train:
                    self.train = TrainStep()
                with gr.Tab(texts.STEPS[3], id=COMPARE, interactive=False, render_children=True) as self.to_compare:
                    self.compare = CompareStep(services.setup)
            self.timer = gr.Timer(1.0, active=False)
            self.seen = gr.State("")
            self.all = [one for one in self.blocks.blocks.values() if not isinstance(one, gr.Row)]
            self._connect_data()
            self._connect_method()
            self._connect_training()
            self._connect_comparing()

    # Which handler answers to what

    def _on(self, event: Any, act: Any, inputs: Any = None, outputs: Any = None, **options: Any) -> Any:
        """Let a method answer to an event, for the session that asks; it may change anything on the page."""

        def answer(request: gr.Request, *values: Any) -> Any:
            return act(self.session(request), *values)

        def answers(request: gr.Request, *values: Any) -> Any:
            yield from act(self.session(request), *values)

        handler = answers if inspect.isgeneratorfunction(act) else answer
        return event(handler, inputs, outputs or self.all, show_progress="hidden", **options)

    def _connect_data(self) -> None:
        data, on = self.data, self._on
        for key, button in data.examples.items():
            on(
                button.click,
                partial(self._do, partial(self.services.take_example, key=key)),
                api_name=f"example_{key}",
            )
        on(data.upload.upload, self._upload, data.upload, api_name="upload", concurrency_limit=2)
        on(data.model.input, self._choose_model, data.model, api_name="model")
        on(data.use_other.click, self._name_model, [data.other_id, data.unaligned_id], api_name="other_model")
        source = [data.hub_name, data.hub_subset, data.hub_split, data.hub_first, data.hub_count]
        on(
            data.use_hub.click,
            partial(self._read, self.services.take_dataset),
            source,
            api_name="dataset",
            concurrency_limit=2,
        )
        reading = [*data.columns.values(), data.encoding]
        roles = [box.input for box in reading]
        on(partial(gr.on, roles), self._preview, reading, api_name="preview", trigger_mode="always_last")
        on(data.again.click, self._read_again, reading, api_name="read_again")
        on(data.scan.click, self._scan, api_name="scan")
        on(data.stop.click, self._cancel, api_name="stop_scan", queue=False)
        on(data.leave_out.click, partial(self._read, self.services.leave_out), api_name="leave_out")
        data.proceed.click(lambda: gr.Tabs(selected=METHOD), None, self.steps, api_visibility="private")

    def _connect_method(self) -> None:
        method, on, form = self.method, self._on, list(self.method.form.values())
        changes = [getattr(one, "input", None) or one.change for one in method.form.values()]
        on(partial(gr.on, changes), self._remember, form, queue=False, api_name="remember")
        on(method.recipe.upload, self._take_recipe, method.recipe, api_name="take_recipe", concurrency_limit=2)
        on(method.drop_recipe.click, partial(self._do, self.services.drop_recipe), api_name="drop_recipe")
        on(method.own.add.click, self._take_own, method.own.inputs, api_name="take_own", concurrency_limit=2)
        on(method.own.remove.click, partial(self._do, self.services.drop), method.own.what, api_name="drop_own")
        on(method.check.click, self._check, form, api_name="check")

    def _connect_training(self) -> None:
        train, on = self.train, self._on
        on(train.start.click, partial(self._begin, self.services.start), api_name="start")
        on(train.cancel.click, self._cancel, api_name="cancel", queue=False)
        on(train.go_on.click, partial(self._begin, self.services.go_on), api_name="go_on")
        on(self.timer.tick, self._tick, self.seen, queue=False, api_name="tick")
        train.proceed.click(lambda: gr.Tabs(selected=COMPARE), None, self.steps, api_visibility="private")

    def _connect_comparing(self) -> None:
        compare, on = self.compare, self._on
        asking = on(
            partial(gr.on, [compare.ask.click, compare.question.submit]),
            self._ask,
            [compare.question, compare.whom, compare.system, compare.temperature, compare.talk],
            [compare.answers, compare.talk, compare.question],
            concurrency_limit=8,
            api_name="ask",
        )
        compare.stop.click(None, None, None, cancels=[asking])
        compare.fresh.click(lambda: ("", []), None, [compare.answers, compare.talk], cancels=[asking])
        on(compare.run.input, self._show_run, compare.run, api_name="show_run")
        on(compare.other.input, self._show_other, compare.other, api_name="show_other")
        for label, button in compare.review.labels.items():
            on(button.click, partial(self._label, label), compare.review.place, api_name=f"label_{label}")
        for button, step in ((compare.review.back, -1), (compare.review.skip, 1)):
            on(button.click, partial(self._turn, step), compare.review.place, api_visibility="private")
        on(compare.rename.click, self._rename, compare.name, api_name="rename")
        for button, asked in ((compare.delete, True), (compare.keep, False)):
            button.click(
                partial(compare.asked_to_delete, asked), None, self.all, queue=False, api_visibility="private"
            )
        on(compare.sure.click, self._delete, api_name="delete")
        on(self.blocks.load, self._load, api_name="load")

    # What is shown

    def session(self, request: gr.Request) -> Session:
        """Return the session of a request."""
        found = self.services.sessions.get(request.request.cookies.get(COOKIE) if request.request else None)
        if found is None:
            raise gr.Error(texts.NO_SESSION)
        return found

    def _show_steps(self, session: Session) -> Updates:
        """Return updates of the steps: those that were reached stay reachable."""
        usable = session.inspection is not None and session.inspection.rows > 0
        trained = session.job("train") is not None
        return {
            self.to_method: gr.Tab(interactive=usable or trained),
            self.to_train: gr.Tab(interactive=session.draft is not None or trained),
            self.to_compare: gr.Tab(interactive=session.compared is not None),
        }

    def _show_data(self, session: Session, problem: str = "") -> Updates:
        limit = self.method.values(session)["max_length"] or 0
        shown = self.data.show(session, limit, problem) | self.method.show(session)
        return shown | self._show_training(session) | self.train.show_plan(session) | self._show_steps(session)

    def _show_training(self, session: Session, *, curves: bool = True) -> Updates:
        job = session.job("train")
        place = self.services.queue.place(job) if job is not None else None
        return self.train.show(session, place, curves=curves)

    def _show_jobs(self, session: Session) -> Updates:
        busy = {self.timer: gr.Timer(active=session.busy)}
        shown = self.data.show_scan(session) | self._show_training(session) | self._show_steps(session)
        return busy | shown

    # What happens

    def _load(self, session: Session) -> Updates:
        """Show a session as it is: the page has been opened, or loaded again."""
        job = session.job("train")
        step = DATA
        if job is not None:
            step = COMPARE if job.progress.state == "done" else TRAIN
        elif session.draft is not None:
            step = TRAIN
        elif session.form.keys() - {"skip_bad"}:  # a box of the first step
            step = METHOD
        shown = self._show_data(session) | self._show_jobs(session) | self.compare.show(session)
        return {**shown, self.steps: gr.Tabs(selected=step)}

    def _do(self, act: Callable[..., Any], session: Session, *values: Any) -> Updates:
        """Do something that changes what is chosen."""
        return self._show_data(session, _problem(partial(act, session, *values)))

    def _upload(self, session: Session, path: str | None) -> Iterator[Updates]:
        if path:
            yield from self._read(self.services.take_file, session, Path(path))

    def _read_again(self, session: Session, *chosen: str) -> Iterator[Updates]:
        columns = dict(zip(self.data.columns, chosen, strict=False))
        yield from self._read(self.services.read_again, session, columns, chosen[-1])

    def _preview(self, session: Session, *chosen: str) -> Iterator[Updates]:
        """Show the first rows as they would be read with the columns that are chosen."""
        columns = dict(zip(self.data.columns, chosen, strict=False))
        rows: list[Sample] = []
        place, work = self.data.preview, self.services.preview(session, columns, chosen[-1], rows)
        shown = lambda problem: {place: html.panel("info", problem) if problem else samples(rows)}  # noqa: E731
        yield from self._working(work, {place: html.working(texts.READING, 0, 0)}, shown)

    def _choose_model(self, session: Session, key: str) -> Iterator[Updates]:
        """Use another model, or ask which; leaving the list counts as choosing from it."""
        if key in (OTHER, session.model.key):
            yield {self.data.other: gr.Group(visible=key == OTHER)}
        else:
            yield from self._read(self.services.take_model, session, key)

    def _name_model(self, session: Session, name: str, unaligned: str) -> Iterator[Updates]:
        yield from self._read(self.services.take_model, session, "", name, unaligned)

    def _read(self, act: Callable[..., Iterator[None]], session: Session, *values: Any) -> Iterator[Updates]:
        """Do something that reads rows: show that it is under way, and then what is in them."""

        def shown(problem: str) -> Updates:
            return self._show_data(session, problem) | self.data.emptied(session) | self.compare.show(session)

        yield from self._working(act(session, *values), self.data.reading(), shown)

    def _working(self, work: Iterator[None], busy: Updates, show: Callable[[str], Updates]) -> Iterator[Updates]:
        """Show that something is under way, and then what came of it; a browser that leaves ends it."""
        yield busy
        problem = ""
        try:
            for _ in work:
                yield {self.seen: gr.skip()}  # whether the browser has left shows only when something is sent
        except ValueError as error:
            problem = str(error)
        yield show(problem)

    def _scan(self, session: Session) -> Updates:
        problem = _problem(partial(self.services.scan, session))
        shown = self._show_jobs(session)
        return shown | ({self.data.ranking: html.panel("error", problem)} if problem else {})

    def _remember(self, session: Session, *values: Any) -> Updates:
        """Keep what the form says, for a reload; what was checked before no longer holds."""
        session.form = self.method.entered(session, values)
        changed(session)
        return self.train.show_plan(session) | self._show_training(session, curves=False)

    def _take_recipe(self, session: Session, path: str | None) -> Iterator[Updates]:
        work = self.services.take_recipe(session, Path(path or ""))
        shown = lambda problem: self._show_data(session) | self.method.show_taken(session, problem)  # noqa: E731
        yield from self._working(work, {self.method.taken: html.working(texts.READING, 0, 0)}, shown)

    def _take_own(self, session: Session, path: str | None, what: str, *said: str) -> Iterator[Updates]:
        """Use an uploaded file, or a published suite, for methods or the comparison."""
        panel, told = self.method.own, dict(zip(SAID, said, strict=True))
        work = self.services.take_own(session, Path(path) if path else None, what, told)

        def shown(problem: str) -> Updates:
            return panel.emptied(problem) | panel.show(session, problem) | self.train.show_plan(session)

        yield from self._working(work, {panel.listed: html.working(texts.READING, 0, 0)}, shown)

    def _check(self, session: Session, *values: Any) -> Updates:
        """Check what was chosen, and go on to the training if it can be run."""
        session.form = self.method.entered(session, values)
        try:
            methods, settings, fields = self.method.read(session)
            self.services.check(session, methods, settings, fields, skip_bad=bool(session.form.get("skip_bad")))
        except ValueError as error:
            return {self.method.problem: html.panel("error", str(error)), **self._show_training(session, curves=False)}
        session.save()
        shown = {self.steps: gr.Tabs(selected=TRAIN), self.method.problem: "", self.train.problem: ""}
        return shown | self.train.show_plan(session) | self._show_training(session) | self._show_steps(session)

    def _begin(self, what: Callable[[Session], Any], session: Session) -> Updates:
        problem = _problem(partial(what, session))
        return self._show_jobs(session) | {self.train.problem: html.panel("error", problem) if problem else ""}

    def _cancel(self, session: Session) -> Updates:
        """Cancel whatever is under way; what becomes of it comes with the next ticks."""
        for job in session.jobs:
            if not job.ended:
                self.services.queue.cancel(job)
        return self._show_jobs(session) | {self.timer: gr.Timer(active=True), self.train.problem: ""}

    def _tick(self, session: Session, seen: str) -> Updates:
        """Show what is new; while a job runs, its clock always is."""
        busy = session.busy
        state = " ".join(f"{j.id}/{j.progress.version}/{j.ended}/{self.services.queue.place(j)}" for j in session.jobs)
        if state == seen:
            return {self.timer: gr.Timer(active=busy), **self._show_training(session, curves=False)}
        # What came out is drawn once, at the end, so that what is open in it stays open.
        shown = {} if busy else self.compare.show(session) | self.compare.hushed(session)
        return {**self._show_jobs(session), **shown, self.seen: state, self.timer: gr.Timer(active=busy)}

    def _ask(
        self,
        session: Session,
        question: str,
        whom: list[str],
        system: str | None,
        temperature: float,
        talk: list[Turn],
    ) -> Iterator[tuple[str, list[Turn], Any]]:
        """Ask the models; answers come word by word."""
        turn, problem = Turn(question), ""
        asked = [*talk, turn]
        try:
            yield answered(asked, waiting=True), talk, ""
            for title, text in self.services.questions(session, asked, whom, system or "", temperature):
                turn.answers[title] = text
                yield answered(asked, waiting=True), asked, gr.skip()
        except ValueError as error:
            problem = str(error)
        except Exception:
            logger.exception("A question could not be answered.")
            problem = texts.ASK_FAILED
        if problem:
            yield answered(talk, waiting=False) + html.panel("error", problem), talk, question
        else:
            yield answered(asked, waiting=False), asked, gr.skip()

    def _show_run(self, session: Session, run: str) -> Updates:
        session.shown, session.beside = run, None
        return self.compare.show(session) | self.compare.hushed(session)

    def _show_other(self, session: Session, run: str) -> Updates:
        session.beside = run or None
        return self.compare.show(session)

    def _label(self, label: str, session: Session, place: int) -> Updates:
        self.services.label(session, place, label)
        return self.compare.show(session) | self.compare.review.show(session, place + 1)

    def _turn(self, step: int, session: Session, place: int) -> Updates:
        return self.compare.review.show(session, place + step)

    def _rename(self, session: Session, name: str) -> Updates:
        self.services.rename(session, name)
        return self.compare.show(session) | self.compare.unnamed(session)

    def _delete(self, session: Session) -> Updates:
        self.services.delete(session)
        return self.compare.show(session) | self.compare.hushed(session) | self._show_jobs(session)


def _problem(wish: Callable[[], Any]) -> str:
    """Do something, and return what went wrong in words for the user."""
    try:
        wish()
    except ValueError as error:
        return str(error)
    return ""
