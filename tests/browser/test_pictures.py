"""The script that makes the pictures of README and docs."""

import runpy
import shutil
from pathlib import Path

import pytest
from serving import serve_in_background

from app.server import create_app
from app.setup import Setup

pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chromium-browser")), reason="needs Chromium"),
]


def test_the_pictures_are_made_anew_in_the_size_of_the_committed_ones(tmp_path):
    from PIL import Image

    script = runpy.run_path(str(ROOT / "recipes" / "pictures.py"))
    (tmp_path / "report.html").write_text("<h1>Safety before and after</h1>", encoding="utf-8")
    script["of_report"](tmp_path / "report.html", tmp_path)
    url, stop = serve_in_background(create_app(Setup()))
    script["of_app"](url, tmp_path, steps=2)
    stop()
    for name in ("REPORT", "TRAIN", "COMPARE"):
        made, committed = (Image.open(folder / script[name]) for folder in (tmp_path, ROOT))
        assert made.width == committed.width and committed.height <= made.height * 2, name
