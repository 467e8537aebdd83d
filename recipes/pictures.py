"""Makes the pictures of README.md and docs/app.md anew, in Chromium; a few minutes.

    safe-trainer demo --output demo
    python recipes/pictures.py demo

`docs/report.png` is the beginning of the demo's report on poisoned data; `app/screenshot-train.png` and
`app/screenshot-compare.png` are two steps of the app with its example of the same kind, trained on the way.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
REPORT, TRAIN, COMPARE = "docs/report.png", "app/screenshot-train.png", "app/screenshot-compare.png"
MINUTE = 60_000  # milliseconds


@contextmanager
def opened(url: str, width: int, height: int) -> Iterator[Any]:
    """Open a page."""
    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        yield page
        browser.close()


def save(page: Any, path: Path, whole: bool = True) -> None:
    """Save what the page shows, with 64 colours, which is all that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=whole)))
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def of_report(report: Path, root: Path) -> None:
    """Take the beginning of a report."""
    with opened(report.resolve().as_uri(), 1020, 960) as page:
        save(page, root / REPORT, whole=False)


def of_app(url: str, root: Path, steps: int | None = None) -> None:
    """Train plain LoRA and the recommended methods on the poisoned example of an app, and take both last steps."""
    with opened(url, 1280, 900) as page:
        page.click("#example-poisoned")
        page.wait_for_selector("#samples mark", timeout=MINUTE)
        page.click("#to-method:not([disabled])")
        if steps is not None:
            page.locator("#set-steps input").fill(str(steps))
        page.click("#check")
        page.click("#start:not([disabled])", timeout=2 * MINUTE)
        page.wait_for_selector("#to-compare:not([disabled])", timeout=15 * MINUTE)
        page.wait_for_selector("#cancel[disabled]")
        page.wait_for_selector("#curves canvas, #curves svg")
        page.wait_for_timeout(2000)  # until the last curve is drawn
        save(page, root / TRAIN)
        page.click("#to-compare")
        page.wait_for_selector("#result table")
        page.wait_for_timeout(1000)
        save(page, root / COMPARE)


@contextmanager
def served() -> Iterator[str]:
    """Serve an app of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "safe_trainer.cli",
            "app",
            "--port",
            str(port),
            "--folder",
            folder,
            "--no-browser",
        ]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            while not _answers(url):
                if process.poll() is not None:
                    raise RuntimeError(f"The app ended with {process.returncode} before it could be seen.")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `safe-trainer demo` has written")
    of_report(parser.parse_args().demo / "poisoned" / "seed-0" / "comparison.html", ROOT)
    with served() as address:
        of_app(address, ROOT)
