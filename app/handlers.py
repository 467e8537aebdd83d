"""What happens when something is pressed: a wish of one session, and the page made anew from its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from . import texts
from .actions import Services
from .hub import push
from .orders import defaults, python_code
from .security import cookie_of
from .sessions import Session
from .views import compare_step, data_step, html, method_step, train_step

logger = logging.getLogger(__name__)

DATA, METHOD, TRAIN, COMPARE = range(1, 5)


class Handlers:
    """The handlers. Each finds out first whose request it is; what it returns are updates for the page's components.

    Args:
        services ([`Services`]): What can be done.
    """

    def __init__(self, services: Services) -> None:
        self.services = services

    def session(self, request: gr.Request) -> Session:
        """Return the session of a request."""
        found = self.services.sessions.get(cookie_of(request.headers.get("cookie")))
        if found is None:
            raise gr.Error(texts.NO_SESSION)
        return found

    def load(self, request: gr.Request) -> list[Any]:
        """Show a session as it is: the page has been opened, or loaded again."""
        session = self.session(request)
        job = session.job("train")
        step = DATA if job is None else COMPARE if job.progress.state == "done" else TRAIN
        ranking = data_step.ranked(session.job("scan"))
        timer = gr.Timer(active=session.busy)
        return [gr.Walkthrough(selected=step), *self._data(session), timer, ranking, *self._jobs(session)]

    def example(self, key: str) -> Callable[[gr.Request], list[Any]]:
        """Return the handler that uses an example."""

        def take(request: gr.Request) -> list[Any]:
            session = self.session(request)
            return self._data(session, self._try(self.services.take_example, session, key))

        return take

    def upload(self, path: str | None, request: gr.Request) -> list[Any]:
        """Use an uploaded file."""
        session = self.session(request)
        problem = self._try(self.services.take_file, session, Path(path)) if path else ""
        return [None, *self._data(session, problem)]

    def choose_model(self, key: str, request: gr.Request) -> list[Any]:
        """Use another model, or ask which."""
        session = self.session(request)
        if key == data_step.OTHER:
            return [gr.Group(visible=True), *[gr.skip()] * len(self._data(session))]
        problem = self._try(lambda: self.services.take_model(session, self.services.model(key)))
        return [gr.Group(visible=False), *self._data(session, problem)]

    def name_model(self, name: str, unaligned: str, request: gr.Request) -> list[Any]:
        """Use a model of the Hub."""
        session = self.session(request)
        wish = lambda: self.services.take_model(session, self.services.model("", name, unaligned))  # noqa: E731
        return self._data(session, self._try(wish))

    def scan(self, request: gr.Request) -> list[Any]:
        """Start a scan."""
        session = self.session(request)
        problem = self._try(self.services.scan, session)
        shown = html.panel("error", problem) if problem else data_step.ranked(session.job("scan"))
        return [shown, gr.Timer(active=session.busy)]

    def check(self, request: gr.Request, skip_bad_rows: bool, *values: Any) -> list[Any]:
        """Check what was chosen, and go on to the training if it can be run."""
        session = self.session(request)
        try:
            protections, settings = method_step.read(values)
            variants, plan = self.services.check(session, protections, settings, skip_bad_rows=skip_bad_rows)
        except ValueError as error:
            return [gr.skip(), html.panel("error", str(error)), *[gr.skip()] * 4, *self._training(session)]
        choices = [(variant.title, variant.key) for variant in variants]
        which = gr.Dropdown(choices=choices, value=variants[-1].key)
        shown = train_step.planned(plan, len(variants))
        return [
            gr.Walkthrough(selected=TRAIN),
            "",
            shown,
            which,
            *self.recipe(variants[-1].key, request),
            *self._training(session),
        ]

    def recipe(self, key: str, request: gr.Request) -> list[Any]:
        """Show the recipe and the code of a variant."""
        session = self.session(request)
        variant = next((v for v in session.variants if v.key == key), None)
        if variant is None or session.draft is None:
            return ["", ""]
        text = (session.draft / variant.recipe).read_text(encoding="utf-8")
        return [text, python_code(session.draft, variant)]

    def start(self, request: gr.Request) -> list[Any]:
        """Start the training."""
        session = self.session(request)
        problem = self._try(self.services.start, session)
        shown = html.panel("error", problem) if problem else ""
        return [shown, *self._training(session), gr.Timer(active=session.busy)]

    def cancel(self, request: gr.Request) -> list[Any]:
        """Cancel whatever is under way; what becomes of it comes with the next ticks."""
        session = self.session(request)
        for job in session.jobs:
            if not job.ended:
                self.services.queue.cancel(job)
        return ["", *self._training(session), gr.Timer(active=True)]

    def tick(self, seen: str, request: gr.Request) -> list[Any]:
        """Show what is new, if anything is."""
        session = self.session(request)
        state = " ".join(f"{j.id}/{j.progress.version}/{j.ended}/{self.services.queue.place(j)}" for j in session.jobs)
        jobs = self._jobs(session)
        if state == seen:
            return [gr.skip()] * (3 + len(jobs))
        ranking = data_step.ranked(session.job("scan"))
        # The picture of what came out is drawn once, at the end, so that what is open in it stays open.
        if session.busy:
            jobs[-compare_step.OUTPUTS :] = [gr.skip()] * compare_step.OUTPUTS
        return [state, gr.Timer(active=session.busy), ranking, *jobs]

    def ask(self, question: str, whom: list[str], request: gr.Request) -> Iterator[str]:
        """Ask the models; answers come word by word."""
        session = self.session(request)
        try:
            answers: dict[str, str] = {}
            yield compare_step.answered(answers, waiting=True)
            for title, text in self.services.questions(session, question, whom):
                answers[title] = text
                yield compare_step.answered(answers, waiting=False)
        except ValueError as error:
            yield html.panel("error", str(error))
        except Exception:
            logger.exception("A question could not be answered.")
            yield html.panel("error", texts.ASK_FAILED)

    def push(self, title: str, repository: str, request: gr.Request) -> str:
        """Push an adapter with the login of this machine, where the app is run by its only user."""
        return self._pushed(title, repository, request, None)

    def push_as_user(self, title: str, repository: str, request: gr.Request, token: gr.OAuthToken | None) -> str:
        """Push an adapter with the login that the user has given to the Space."""
        return self._pushed(title, repository, request, token.token if token else "")

    def _pushed(self, title: str, repository: str, request: gr.Request, token: str | None) -> str:
        job = self.session(request).job("train")
        folder = self.services.adapters(job).get(title) if job is not None else None
        try:
            if folder is None:
                raise ValueError(texts.NO_COMPARISON)
            if token == "":
                raise ValueError(texts.PUSH_LOGIN)
            return html.panel("good", push(folder, repository, token))
        except ValueError as error:
            return html.panel("error", str(error))

    def _data(self, session: Session, problem: str = "") -> list[Any]:
        found = session.inspection
        settings = defaults(session.model, found.rows if found else 0, found.example if found else None)
        shown = data_step.show(self.services.setup, session.model, found, settings.max_length, problem)
        return [*shown, *method_step.show(session.model, settings)]

    def _training(self, session: Session) -> list[Any]:
        job = session.job("train")
        place = self.services.queue.place(job) if job is not None else None
        return train_step.show(job, place, ready=session.choices is not None)

    def _jobs(self, session: Session) -> list[Any]:
        job = session.job("train")
        titles = list(self.services.adapters(job)) if job is not None else []
        return [*self._training(session), *compare_step.show(job, titles)]

    def _try(self, wish: Any, *args: Any) -> str:
        """Do something, and return what went wrong in words for the user."""
        try:
            wish(*args)
        except ValueError as error:
            return str(error)
        return ""
