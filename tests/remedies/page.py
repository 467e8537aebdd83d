"""The page: what it says of what is done there, step by step."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from app import texts
from app.actions import Services
from app.answering import Answerer, Turn
from app.inspection import Inspection, apart, inspect
from app.jobs import scan_job
from app.recipes import GUARD, Settings
from app.server import serve
from app.sessions import Sessions
from app.setup import EMBEDDED, Limits, Model, Setup
from app.views.data_step import described

from .app import OWN, own, prompts
from .room import CSV, Case

GUARD_MODEL = "owner/guard"


class Patient:
    """A queue in which jobs wait."""

    def submit(self, job: Any) -> None:
        self.job = job

    def close(self) -> None: ...


def opened(at: SimpleNamespace) -> tuple[Services, Any]:
    """The page of a user, anew."""
    setup = Setup({EMBEDDED.key: EMBEDDED, GUARD_MODEL: Model(GUARD_MODEL, at.aligned)})
    services = Services(setup, Sessions(at.folder / "app"), Patient(), at.folder / "uploads")  # type: ignore[arg-type]
    return services, services.sessions.get(services.sessions.new_cookie())


def checked(at: SimpleNamespace) -> tuple[Services, Any]:
    services, session = opened(at)
    services.take_example(session, "attack")
    services.check(session, ["plain"], Settings(steps=2, prompts=4), {}, skip_bad=False)
    return services, session


def started(at: SimpleNamespace, times: int = 1, stops: bool = False) -> None:
    services, session = checked(at)
    for _ in range(times):
        job = services.start(session)
        if stops:
            job.cancel()
            job.run()


def stale(at: SimpleNamespace, again: bool) -> None:
    services, session = checked(at)
    services.take_example(session, "benign")
    if again:
        services.check(session, ["plain"], Settings(steps=2, prompts=4), {}, skip_bad=False)
    services.start(session)


def columns(at: SimpleNamespace, **chosen: str) -> Any:
    services, session = opened(at)
    session.inspection = Inspection(Path(at.written(CSV)), "mine.csv", rows=1)
    return services.reading_of(session, chosen, "")


def asking(at: SimpleNamespace, question: str, *titles: str) -> Any:
    services, session = opened(at)
    return services.questions(session, [Turn(question)], list(titles), "", 0.0)


def talked(path: str, *turns: dict[str, str]) -> Any:
    return list(Answerer().ask(Model("tiny", path), {"before": None}, {"before": list(turns)}, 2))


def said(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def strict(at: SimpleNamespace) -> str:
    """A model whose template takes no system turn."""
    if not (folder := at.folder / "strict").exists():
        shutil.copytree(at.aligned, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        tokenizer.chat_template = refusal + str(tokenizer.chat_template)
        tokenizer.save_pretrained(folder)
    return str(folder)


def shown(at: SimpleNamespace, rows: Any, asked_for: str, limit: int = 1024) -> None:
    """Refuse a file of which the page says so."""
    path = Path(at.written("\n".join(map(json.dumps, rows)).encode(), "mine.jsonl"))
    text = str(described(inspect(path, "mine.jsonl", EMBEDDED, Limits()), limit))
    if asked_for in text:
        raise ValueError(text)


def rows(count: int = 4, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}.", "completion": "One.", **columns} for n in range(count)]


def read_within(seconds: float) -> None:
    for _ in apart(seconds, time.sleep, 1.0):
        pass


@contextmanager
def taken() -> Iterator[int]:
    """A port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def served(**settings: Any) -> None:
    """Serve, as far as the port, which is in use."""
    with taken() as port:
        try:
            serve(port=port, **settings)
        except ValueError as error:
            if "could not be opened" not in str(error):
                raise


def bound(port: int) -> None:
    from app.server import _bound

    _bound("127.0.0.1", port).close()


def on_a_taken_port(at: SimpleNamespace) -> None:
    with taken() as port:
        bound(port)


JOBS: dict[str, Case] = {
    "nothing that was checked": (
        lambda at: (lambda services, session: services.start(session))(*opened(at)),
        "Choose data and a method, then press “Check and continue” in step 2",
        [lambda at: started(at)],
    ),
    "another choice after the check": (
        lambda at: stale(at, again=False),
        "Your data, model or settings changed since the last check. Press “Check and continue” in step 2 again",
        [lambda at: stale(at, again=True)],
    ),
    "two jobs at once": (
        lambda at: started(at, 2),
        "One of your jobs is still running. Stop it, or wait for it to finish",
        [lambda at: started(at, 2, stops=True)],
    ),
}
PAGE: dict[str, Case] = {
    **JOBS,
    "one column for both": (
        lambda at: columns(at, prompt="prompt"),
        "Choose a column for the prompt and another one for the answer",
        [lambda at: columns(at, prompt="prompt", answer="completion")],
    ),
    "no guard model": (
        lambda at: opened(at)[0].judges(Settings(judge=GUARD)),
        "Name the guard model that judges the answers, as owner/name",
        [lambda at: opened(at)[0].judges(Settings(judge=GUARD, guard=GUARD_MODEL))],
    ),
    "a scan without harmful rows": (
        lambda at: scan_job(at.folder, at.folder, {}, OWN, at.folder, {}),
        "Upload them in step 2 under “Your own files”",
        [lambda at: scan_job(at.folder, at.folder, {}, OWN, at.folder, own(at))],
    ),
    "nothing to ask with": (
        lambda at: (lambda services, session: next(services.take_own(session, None, "harmful", {})))(*opened(at)),
        "Choose what the file holds, and upload it; or choose a published suite",
        [lambda at: prompts(at, "harmful-behaviors.csv")],
    ),
    "no question": (
        lambda at: asking(at, " ", texts.BEFORE),
        "Write a question first",
        [lambda at: asking(at, "Who?", texts.BEFORE)],
    ),
    "nobody to ask": (
        lambda at: asking(at, "Who?"),
        "Choose at least one model to ask",
        [lambda at: asking(at, "Who?", texts.BEFORE)],
    ),
    "a long conversation": (
        lambda at: talked(at.aligned, said("Who?"), said("I. " * 400, "assistant"), said("Why?")),
        "The conversation is too long for this model .* Start a new one",
        [lambda at: talked(at.aligned, said("Why?"))],
    ),
    "a system prompt that the model does not take": (
        lambda at: talked(strict(at), said("Be brief.", "system"), said("Why?")),
        "This model does not accept the conversation: .* Try without a system prompt",
        [lambda at: talked(strict(at), said("Why?"))],
    ),
    "rows that will be cut": (
        lambda at: shown(at, rows(), "Raise “Max tokens per row” in step 2", 4),
        "of the rows are longer than .* tokens and will be cut. Raise “Max tokens per row” in step 2",
        [lambda at: shown(at, rows(), "Raise “Max tokens per row”", 1024)],
    ),
    "rows that are labelled": (
        lambda at: shown(at, rows(is_safe=False), "labelled harmful"),
        "rows are labelled harmful, and would be learned. Remove them from the file",
        [lambda at: shown(at, rows(is_safe=True), "labelled harmful"), lambda at: shown(at, rows(), "labelled")],
    ),
    "rows that cannot be used": (
        lambda at: shown(at, [*rows(), {"prompt": "Say it."}], "tick the box"),
        "Some rows cannot be used. Fix the file, or tick the box below the table to continue without them",
        [lambda at: shown(at, rows(5), "tick the box"), lambda at: skipped(at, [*rows(), {"prompt": "Say it."}])],
    ),
    "a file that takes too long": (
        lambda at: read_within(0.1),
        "Reading the file took too long or too much memory. Split it into smaller files",
        [lambda at: read_within(60.0)],
    ),
    "an address without a password": (
        lambda at: served(host="0.0.0.0"),
        "Set it with --password-file or in SAFE_TRAINER_PASSWORD, or leave out --host to bind to 127.0.0.1",
        [lambda at: served(host="0.0.0.0", password="secret"), lambda at: served()],
    ),
    "an empty password": (
        lambda at: served(password=" "),
        "`password` is empty. Write one to the password file, or leave the option out",
        [lambda at: served(password="secret"), lambda at: served()],
    ),
    "a port that is in use": (
        on_a_taken_port, "could not be opened: .* Choose another with --port", [lambda at: bound(0)]
    ),
}  # fmt: skip


def skipped(at: SimpleNamespace, given: Any) -> None:
    """Continue without the rows that cannot be used."""
    services, session = opened(at)
    path = Path(at.written("\n".join(map(json.dumps, given)).encode(), "mine.jsonl"))
    session.inspection, session.model = inspect(path, "mine.jsonl", EMBEDDED, Limits()), EMBEDDED
    services.check(session, ["plain"], Settings(steps=2, prompts=4), {}, skip_bad=True)
