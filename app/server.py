"""The server: guarded pages, downloads for their owners only, and an orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from . import texts
from .actions import Services
from .downloads import file_of
from .inspection import tokenizer_of, warm_up
from .jobs import JobQueue
from .security import Guard, is_loopback
from .sessions import COOKIE, Sessions
from .setup import EMBEDDED, Setup, local_setup

logger = logging.getLogger(__name__)

GRACE = 2
"""Seconds that open pages may hold up the end, for their connections never close by themselves."""
_SWEEP = 300.0  # seconds between two looks for idle sessions


def create_app(
    setup: Setup,
    *,
    folder: Path | None = None,
    password: str | None = None,
    hosts: Iterable[str] | None = (),
    alone: bool = False,
) -> FastAPI:
    """Return the app, ready to be served; `app.state.services` is what it can do.

    Args:
        setup ([`Setup`]): How it is run.
        folder (`Path`, *optional*): Where files are kept; a temporary folder that goes with the app if left out.
        password (`str`, *optional*): Asked for before anything is shown.
        hosts (`Iterable[str]`, *optional*): Names under which it is reached beside this machine's own; all if `None`.
        alone (`bool`, *optional*, defaults to `False`): Whether it is the only app of its process. Gradio keeps the
            uploads of a process in one folder, which then is among the app's files.
    """
    _set_environment()
    import gradio as gr
    from gradio.utils import get_upload_folder

    from .page import Page

    _import_early()
    sessions = Sessions(folder, setup.limits.idle_hours)
    if alone:
        os.environ["GRADIO_TEMP_DIR"] = str(sessions.folder / "uploads")
    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    services = Services(setup, sessions, JobQueue(setup.limits.waiting), uploads)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.state.services = services
    app.add_middleware(Guard, services=services, password=password, hosts=hosts)
    app.add_api_route("/download/{job}/{variant}/{kind}", _download, methods=["GET"])
    page = Page(services)
    page.blocks.queue(max_size=64, default_concurrency_limit=8)
    queue = page.blocks._queue  # looks for work a thousand times a second, but on Windows as seldom as this
    queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.05, 0.1
    gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        server_name="127.0.0.1",
        show_error=False,
        max_file_size=setup.limits.megabytes * 2**20,
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        allowed_paths=[],
        footer_links=[],
        css_paths=Path(__file__).with_name("style.css"),
        theme=_theme(),
    )
    return app


def _theme() -> Any:
    """Return Gradio's default theme with the machine's own fonts, and greys that can be read."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
    )


def serve(  # noqa: PLR0913, each is a setting with a name
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    password: str | None = None,
    models: dict[str, str] | None = None,
    folder: Path | None = None,
    browser: bool = True,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the app on this machine until Ctrl-C.

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`): The address to bind to.
        port (`int`, *optional*, defaults to `7860`): The port.
        password (`str`, *optional*): Needed for any other address than this machine's own.
        models (`dict[str, str]`, *optional*): Models on disk, by the name to show.
        folder (`Path`, *optional*): Where files and the history of runs are kept; by default they are removed when the
            server ends.
        browser (`bool`, *optional*, defaults to `True`): Whether to open the browser.
        on_ready (`Callable`, *optional*): Called with the address once it can be opened.

    Raises:
        ValueError: If others could reach it and there is no password, the password is empty, or the port is taken.
    """
    shared = not is_loopback(host)
    if password is not None and not password.strip():
        raise ValueError(texts.PASSWORD_EMPTY)
    if shared and not password:
        raise ValueError(texts.PASSWORD_NEEDED.format(host=host))
    import uvicorn

    with contextlib.closing(_bound(host, port)) as listening:
        setup = local_setup(models)
        app = create_app(setup, folder=folder, password=password, hosts=None if shared else (), alone=True)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(app.state.services):
            config = uvicorn.Config(app, log_level="warning", server_header=False)
            config.timeout_graceful_shutdown = GRACE
            logging.getLogger("uvicorn.error").addFilter(_is_news)
            if on_ready is not None:
                on_ready(address)
            if browser:
                threading.Timer(1.0, webbrowser.open, [address]).start()
            uvicorn.Server(config).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything is imported, made or said."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(texts.CANNOT_BIND.format(host=host, port=port, reason=error.strerror or error)) from None


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that the connections of open pages were cut off at the end."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    threading.Thread(target=_sweep, args=(services.sessions,), daemon=True, name="sweep").start()
    try:
        yield
    finally:
        services.close()


def _sweep(sessions: Sessions) -> None:
    while sessions.folder.exists():
        time.sleep(_SWEEP)
        sessions.sweep()


async def _download(request: Request, job: str, variant: str, kind: str) -> FileResponse:
    """Send a file of a job to the session that owns it. Its path is ours: only names are looked up."""
    services: Services = request.app.state.services
    session = services.sessions.get(request.cookies.get(COOKIE))
    found = session.job_called(job) if session is not None else None
    file = await asyncio.to_thread(file_of, found, variant, kind) if found is not None else None
    if file is None:
        raise HTTPException(404)
    # As bytes, so that no browser shows a report as a page of this app.
    return FileResponse(file[0], filename=file[1], media_type="application/octet-stream")


def _import_early() -> None:
    """Import what the first visitor would wait for otherwise; no model is loaded."""
    import peft  # noqa: F401, only its time counts
    import trl  # noqa: F401

    from safe_trainer import testbed
    from safe_trainer.data import encode_row

    warm_up()
    encode_row(tokenizer_of(EMBEDDED), testbed.harmful_rows(1)[0])


def _set_environment() -> None:
    """Switch off whatever would call home."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
