"""The folder of the Space: complete, and it starts by itself."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml

from app.space import kept_in
from app.space_folder import build

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("space") / "space")


def test_front_matter_says_what_a_space_must_know(folder):
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert (front["sdk"], front["sdk_version"], front["license"]) == ("gradio", pinned, "apache-2.0")
    assert (folder / front["app_file"]).is_file()
    assert {"title", "emoji", "colorFrom", "colorTo", "python_version", "tags", "models", "datasets"} <= set(front)
    assert len(front["short_description"]) <= 60  # more is refused


def test_requirements_are_those_of_the_package(folder):
    needed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert needed <= {line for line in lines if not line.startswith("#")}


def test_nothing_else_is_uploaded(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "LICENSE", "requirements.txt", "space.py", "app", "safe_trainer"}
    assert not list(folder.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20 * 2**20


def test_runs_are_kept_where_storage_is_mounted(tmp_path):
    assert kept_in(tmp_path) is None
    assert kept_in(Path("/")) == Path("/safe_trainer")


@pytest.mark.exhaustive
def test_the_space_starts_from_its_folder_alone(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
    environment = {**kept, "PORT": str(port), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    where = "import app, safe_trainer; print(app.__file__, safe_trainer.__file__)"
    start = [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {where}"]
    found = subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(Path(path).is_relative_to(folder) for path in found.split())
    server = subprocess.Popen([sys.executable, "space.py"], cwd=folder, env=environment)
    try:
        page = None
        for _ in range(600):
            assert server.poll() is None, "it has ended"
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.ConnectError:
                time.sleep(0.5)
        assert page is not None and page.status_code == 200
        assert "https://huggingface.co" in page.headers["content-security-policy"]
        assert "x-frame-options" not in page.headers
        assert "SameSite=None; Secure; Partitioned" in page.headers["set-cookie"]
    finally:
        server.terminate()
        server.wait(30)
    assert not list(tmp_path.glob("safe_trainer_app_*"))  # nothing is left behind
