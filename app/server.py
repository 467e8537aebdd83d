"""The server: pages behind the guard, downloads for their owners only, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from . import texts
from .actions import Services
from .catalogue import EMBEDDED
from .downloads import file_of
from .inspection import tokenizer_of
from .jobs import JobQueue
from .limits import Setup, local_setup
from .security import Guard, cookie_of, is_loopback
from .sessions import Sessions

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
) -> FastAPI:
    """Return the app, ready to be served; `app.state.services` is what it can do.

    Args:
        setup ([`Setup`]): How it is run.
        folder (`Path`, *optional*): Where files are kept; a temporary folder that goes with the app if left out.
        password (`str`, *optional*): Asked for before anything is shown.
        hosts (`Iterable[str]`, *optional*): Names under which it is reached beside this machine's own; all if `None`.
    """
    _set_environment()
    import gradio as gr

    from .page import Page

    warm_up()

    sessions = Sessions(folder, setup.limits.idle_hours)
    uploads = sessions.folder / "uploads"
    uploads.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    services = Services(setup, sessions, JobQueue(setup.limits.waiting), uploads)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.state.services = services
    app.add_middleware(Guard, sessions=sessions, password=password, hosts=hosts, space=setup.space)
    app.add_api_route("/download/{job}/{variant}/{kind}", _download, methods=["GET"])
    page = Page(services)
    page.blocks.queue(max_size=64, default_concurrency_limit=8)
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


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    password: str | None = None,
    models: dict[str, str] | None = None,
    folder: Path | None = None,
    browser: bool = True,
) -> None:
    """Serve the app on this machine until Ctrl-C.

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`): The address to bind to.
        port (`int`, *optional*, defaults to `7860`): The port.
        password (`str`, *optional*): Needed for any other address than this machine's own.
        models (`dict[str, str]`, *optional*): Models on disk, by the name to show.
        folder (`Path`, *optional*): Where files are kept; by default they go when the server ends.
        browser (`bool`, *optional*, defaults to `True`): Whether to open the browser.

    Raises:
        ValueError: If others could reach it and there is no password.
    """
    if not is_loopback(host) and not password:
        raise ValueError(texts.PASSWORD_NEEDED.format(host=host))
    import uvicorn

    shared = not is_loopback(host)
    setup = local_setup(models, shared=shared)
    app = create_app(setup, folder=folder, password=password, hosts=None if shared else ())
    if browser:
        threading.Timer(1.0, webbrowser.open, [f"http://{host}:{port}/"]).start()
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(app.state.services):
        config = uvicorn.Config(app, host, port, log_level="warning", server_header=False)
        config.timeout_graceful_shutdown = GRACE
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        uvicorn.Server(config).run()


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
    session = services.sessions.get(cookie_of(request.headers.get("cookie")))
    found = session.job_called(job) if session is not None else None
    file = file_of(found, variant, kind) if found is not None else None
    if file is None:
        raise HTTPException(404)
    # As bytes, so that no browser shows a report as a page of this app.
    return FileResponse(file, filename=f"{variant}-{file.name}", media_type="application/octet-stream")


def warm_up() -> None:
    """Import what the first visitor would wait for otherwise; no model is loaded."""
    import peft  # noqa: F401, only its time counts
    import trl  # noqa: F401

    from safe_trainer import encode_row, testbed

    encode_row(tokenizer_of(EMBEDDED), testbed.harmful_rows(1)[0])


def _set_environment() -> None:
    """Switch off whatever would call home."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
