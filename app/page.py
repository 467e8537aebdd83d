"""The page: four steps, and what happens when something is pressed on it.

Each handler finds out first whose request it is, does one thing, and returns updates for the components that change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from . import texts
from .actions import Services, changed
from .recipes import defaults
from .sessions import Session, cookie_of
from .setup import EMBEDDED
from .views import html
from .views.compare_step import CompareStep, answered
from .views.data_step import OTHER, DataStep
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
                    self.method = MethodStep()
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

    def _on(self, event: Any, handler: Any, inputs: Any = None, **options: Any) -> Any:
        """Let a handler answer to an event; it may change anything on the page."""
        return event(handler, inputs, self.all, show_progress="hidden", **options)

    def _connect_data(self) -> None:
        data, on = self.data, self._on
        for key, button in data.examples.items():
            on(button.click, self._example(key), api_name=f"example_{key}")
        on(data.upload.upload, self._upload, data.upload, api_name="upload", concurrency_limit=2)
        on(data.model.input, self._choose_model, data.model, api_name="model")
        on(data.use_other.click, self._name_model, [data.other_id, data.unaligned_id], api_name="other_model")
        on(data.again.click, self._read_again, [data.prompt, data.answer, data.encoding], api_name="read_again")
        on(data.scan.click, self._scan, api_name="scan")
        on(data.stop.click, self._cancel, api_name="stop_scan", queue=False)
        on(data.leave_out.click, self._leave_out, api_name="leave_out")
        data.proceed.click(lambda: gr.Tabs(selected=METHOD), None, self.steps, api_visibility="private")

    def _connect_method(self) -> None:
        method, on = self.method, self._on
        changes = [getattr(one, "input", None) or one.change for one in method.form]
        gr.on(changes, self._remember, method.form, self.all, show_progress="hidden", queue=False, api_name="remember")
        on(
            method.upload.upload,
            self._material,
            [method.kind, method.upload],
            api_name="material",
            concurrency_limit=2,
        )
        on(method.remove.click, self._drop_material, method.kind, api_name="drop_material")
        on(method.check.click, self._check, [self.data.skip_bad, *method.form], api_name="check")

    def _connect_training(self) -> None:
        train, on = self.train, self._on
        on(train.which.input, self._recipe, train.which, api_visibility="private")
        on(train.start.click, self._start, api_name="start")
        on(train.cancel.click, self._cancel, api_name="cancel", queue=False)
        on(self.timer.tick, self._tick, self.seen, queue=False, api_name="tick")
        train.proceed.click(lambda: gr.Tabs(selected=COMPARE), None, self.steps, api_visibility="private")

    def _connect_comparing(self) -> None:
        compare, on = self.compare, self._on
        asking = gr.on(
            [compare.ask.click, compare.question.submit],
            self._ask,
            [compare.question, compare.whom],
            compare.answers,
            show_progress="hidden",
            concurrency_limit=8,
            api_name="ask",
        )
        compare.stop.click(None, None, None, cancels=[asking])
        on(compare.run.input, self._show_run, compare.run, api_name="show_run")
        on(compare.rename.click, self._rename, compare.name, api_name="rename")
        on(compare.delete.click, self._delete, api_name="delete")
        on(self.blocks.load, self._load, api_name="load")

    # What is shown

    def session(self, request: gr.Request) -> Session:
        """Return the session of a request."""
        found = self.services.sessions.get(cookie_of(request.headers.get("cookie")))
        if found is None:
            raise gr.Error(texts.NO_SESSION)
        return found

    def _show_steps(self, session: Session) -> Updates:
        """Return updates of the steps: those that were reached stay reachable."""
        usable = session.inspection is not None and session.inspection.rows > 0
        trained = session.job("train") is not None
        return {
            self.to_method: gr.Tab(interactive=usable or trained),
            self.to_train: gr.Tab(interactive=session.choices is not None or trained),
            self.to_compare: gr.Tab(interactive=session.compared is not None),
        }

    def _show_data(self, session: Session, problem: str = "") -> Updates:
        found = session.inspection
        settings = defaults(session.model, found.rows if found else 0, found.example if found else None)
        limit = session.choices.settings.max_length if session.choices and not session.stale else settings.max_length
        shown = self.data.show(session, limit, problem) | self.method.show(session, settings)
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

    def _load(self, request: gr.Request) -> Updates:
        """Show a session as it is: the page has been opened, or loaded again."""
        session = self.session(request)
        job = session.job("train")
        step = DATA
        if job is not None:
            step = COMPARE if job.progress.state == "done" else TRAIN
        elif session.choices is not None:
            step = TRAIN
        shown = self._show_data(session) | self._show_jobs(session) | self.compare.show(session)
        return {**shown, self.steps: gr.Tabs(selected=step)}

    def _example(self, key: str) -> Callable[[gr.Request], Updates]:

        def take(request: gr.Request) -> Updates:
            session = self.session(request)
            return self._show_data(session, _problem(lambda: self.services.take_example(session, key)))

        return take

    def _upload(self, path: str | None, request: gr.Request) -> Iterator[Updates]:
        session = self.session(request)
        if path:
            yield from self._reading(session, self.services.take_file(session, Path(path)))

    def _read_again(self, prompt: str, answer: str, encoding: str, request: gr.Request) -> Iterator[Updates]:
        session = self.session(request)
        yield from self._reading(session, self.services.read_again(session, prompt, answer, encoding))

    def _leave_out(self, request: gr.Request) -> Iterator[Updates]:
        session = self.session(request)
        yield from self._reading(session, self.services.leave_out(session))

    def _choose_model(self, key: str, request: gr.Request) -> Iterator[Updates]:
        """Use another model, or ask which."""
        if key == OTHER:
            yield {self.data.other: gr.Group(visible=True)}
            return
        session = self.session(request)
        try:
            model = self.services.model(key)
        except ValueError as error:
            yield self._show_data(session, str(error))
            return
        if model == session.model:  # leaving the list counts as choosing from it
            yield {self.data.other: gr.Group(visible=False)}
            return
        if model != EMBEDDED and session.inspection is not None and session.inspection.example is not None:
            session.inspection = None  # its rows are in the embedded model's own language
        yield from self._reading(session, self.services.take_model(session, model))

    def _name_model(self, name: str, unaligned: str, request: gr.Request) -> Iterator[Updates]:
        session = self.session(request)
        try:
            model = self.services.model("", name, unaligned)
        except ValueError as error:
            yield self._show_data(session, str(error))
            return
        yield from self._reading(session, self.services.take_model(session, model))

    def _reading(self, session: Session, work: Iterator[None]) -> Iterator[Updates]:
        """Show that a file is read, and then what is in it; a browser that leaves ends the reading."""
        yield self.data.reading()
        problem = ""
        try:
            for _ in work:
                yield {self.seen: gr.skip()}  # whether the browser has left shows only when something is sent
        except ValueError as error:
            problem = str(error)
        yield self._show_data(session, problem) | self.data.emptied(session) | self.compare.show(session)

    def _scan(self, request: gr.Request) -> Updates:
        session = self.session(request)
        problem = _problem(lambda: self.services.scan(session))
        shown = self._show_jobs(session)
        return shown | ({self.data.ranking: html.panel("error", problem)} if problem else {})

    def _remember(self, request: gr.Request, *values: Any) -> Updates:
        """Keep what the form says, for a reload; what was checked before no longer holds."""
        session = self.session(request)
        changed(session, list(values))
        return self.train.show_plan(session) | self._show_training(session, curves=False)

    def _material(self, kind: str, path: str | None, request: gr.Request) -> Iterator[Updates]:
        """Use an uploaded file for methods or the comparison."""
        session = self.session(request)
        if not path:
            return
        problem = ""
        yield {self.method.files: html.working(texts.READING, 0, 0)}
        try:
            for _ in self.services.take_material(session, kind, Path(path)):
                yield {self.seen: gr.skip()}
        except ValueError as error:
            problem = str(error)
        emptied = {self.method.upload: gr.File(value=None)}
        yield emptied | self.method.show_files(session, problem) | self.train.show_plan(session)

    def _drop_material(self, kind: str, request: gr.Request) -> Updates:
        session = self.session(request)
        self.services.drop_material(session, kind)
        return self.method.show_files(session) | self.train.show_plan(session)

    def _check(self, request: gr.Request, skip_bad: bool, *values: Any) -> Updates:
        """Check what was chosen, and go on to the training if it can be run."""
        session = self.session(request)
        try:
            methods, settings, fields = self.method.read(values)
            self.services.check(session, methods, settings, fields, skip_bad=skip_bad)
        except ValueError as error:
            return {self.method.problem: html.panel("error", str(error)), **self._show_training(session, curves=False)}
        session.form = list(values)
        shown = {self.steps: gr.Tabs(selected=TRAIN), self.method.problem: "", self.train.problem: ""}
        return shown | self.train.show_plan(session) | self._show_training(session) | self._show_steps(session)

    def _recipe(self, key: str, request: gr.Request) -> Updates:
        return self.train.show_recipe(self.session(request), key)

    def _start(self, request: gr.Request) -> Updates:
        session = self.session(request)
        problem = _problem(lambda: self.services.start(session))
        shown = html.panel("error", problem) if problem else ""
        return self._show_jobs(session) | {self.train.problem: shown}

    def _cancel(self, request: gr.Request) -> Updates:
        """Cancel whatever is under way; what becomes of it comes with the next ticks."""
        session = self.session(request)
        for job in session.jobs:
            if not job.ended:
                self.services.queue.cancel(job)
        return self._show_jobs(session) | {self.timer: gr.Timer(active=True), self.train.problem: ""}

    def _tick(self, seen: str, request: gr.Request) -> Updates:
        """Show what is new; while a job runs, its clock always is."""
        session = self.session(request)
        busy = session.busy
        state = " ".join(f"{j.id}/{j.progress.version}/{j.ended}/{self.services.queue.place(j)}" for j in session.jobs)
        if state == seen:
            return {self.timer: gr.Timer(active=busy), **self._show_training(session, curves=False)}
        # What came out is drawn once, at the end, so that what is open in it stays open.
        shown = {} if busy else self.compare.show(session)
        return {**self._show_jobs(session), **shown, self.seen: state, self.timer: gr.Timer(active=busy)}

    def _ask(self, question: str, whom: list[str], request: gr.Request) -> Iterator[str]:
        """Ask the models; answers come word by word."""
        session = self.session(request)
        try:
            answers: dict[str, str] = {}
            yield answered(answers, waiting=True)
            for title, text in self.services.questions(session, question, whom):
                answers[title] = text
                yield answered(answers, waiting=False)
        except ValueError as error:
            yield html.panel("error", str(error))
        except Exception:
            logger.exception("A question could not be answered.")
            yield html.panel("error", texts.ASK_FAILED)

    def _show_run(self, run: str, request: gr.Request) -> Updates:
        session = self.session(request)
        session.shown = run
        return self.compare.show(session)

    def _rename(self, name: str, request: gr.Request) -> Updates:
        session = self.session(request)
        self.services.rename(session, name)
        return self.compare.show(session)

    def _delete(self, request: gr.Request) -> Updates:
        session = self.session(request)
        self.services.delete(session)
        return self.compare.show(session) | self._show_jobs(session)


def _problem(wish: Callable[[], Any]) -> str:
    """Do something, and return what went wrong in words for the user."""
    try:
        wish()
    except ValueError as error:
        return str(error)
    return ""
