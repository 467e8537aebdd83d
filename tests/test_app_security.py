"""What the app must never do, each case tried against a running server."""

import html
import json
import re
import shutil
import socket
import time
import types
from pathlib import Path

import httpx
import pytest
from gradio.utils import get_upload_folder
from serving import serve_in_background

from app.actions import Services
from app.security import is_loopback
from app.server import create_app, serve
from app.sessions import COOKIE, Sessions
from app.setup import Limits, Setup, local_setup, space_setup


@pytest.fixture(scope="module")
def app():
    return create_app(Setup(limits=Limits(megabytes=1), any_model=True))


@pytest.fixture(scope="module")
def url(app):
    url, stop = serve_in_background(app)
    yield url
    stop()


@pytest.fixture
def client(url):
    """A client with a session of its own, as a browser that has opened the page."""
    with httpx.Client(base_url=url) as client:
        client.get("/")
        yield client


def session_of(app, client):
    return app.state.services.sessions.get(client.cookies[COOKIE])


@pytest.mark.slow
def test_every_answer_has_the_headers_and_scripts_need_the_nonce_of_their_page(client):
    page = client.get("/")
    rules = page.headers["content-security-policy"]
    nonce = re.search(r"'nonce-([^']+)'", rules)[1]
    assert page.text.count("<script") == page.text.count(f'<script nonce="{nonce}"') > 0
    assert "'unsafe-inline'" not in rules.split("script-src")[1].split(";")[0]
    for part in ("default-src 'self'", "connect-src 'self'", "object-src 'none'", "frame-ancestors 'none'"):
        assert part in rules
    assert re.search(r"img-src ([^;]*)", rules)[1] == "'self' data: blob:"  # no picture from elsewhere
    for answer in (page, client.get("/gradio_api/info"), client.get("/nowhere")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
    assert client.get("/").headers["content-security-policy"] != rules  # a new nonce every time


@pytest.mark.slow
def test_the_cookie_cannot_be_read_by_scripts_nor_sent_from_other_sites(url):
    found = httpx.get(url).headers["set-cookie"]
    assert "HttpOnly" in found and "SameSite=Strict" in found and "Max-Age" not in found


def test_an_invented_cookie_opens_no_session(app, url):
    for invented in ("", "x", "A" * 64, "é", app.state.services.sessions.new_cookie()[:-2] + "AA"):
        assert app.state.services.sessions.get(invented) is None
    answer = httpx.get(url, headers={"cookie": f"{COOKIE}=invented"})
    assert COOKIE in answer.headers["set-cookie"]  # it is given a new one


@pytest.mark.slow
def test_requests_from_other_sites_and_under_other_names_are_refused(url):
    assert httpx.get(url, headers={"host": "attacker.example"}).status_code == 421
    for path in ("/gradio_api/queue/join", "/gradio_api/upload"):
        assert httpx.post(url + path, headers={"origin": "http://attacker.example"}).status_code == 403


@pytest.mark.slow
def test_a_password_stands_before_everything(tmp_path):
    app = create_app(Setup(), folder=tmp_path, password="open sesame", hosts=None)
    url, stop = serve_in_background(app)
    try:
        for path in ("/", "/config", "/gradio_api/info", "/assets/x.js", "/download/a/b/c", "/gradio_api/file=x"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, auth=("anyone", "wrong")).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Basic !"}).status_code == 401
            assert httpx.get(url + path, auth=("anyone", "open sesame")).status_code != 401
        page = httpx.get(url, auth=("anyone", "open sesame"))
        assert "Max-Age=31536000" in page.headers["set-cookie"]  # files are kept, so they can be found again
    finally:
        stop()


@pytest.mark.slow
def test_guessing_a_password_is_slow_and_logged(tmp_path, caplog):
    app = create_app(Setup(), folder=tmp_path, password="open sesame", hosts=None)
    url, stop = serve_in_background(app)
    try:
        guess = lambda word: httpx.get(url, auth=("anyone", word)).status_code  # noqa: E731
        assert [guess(f"guess {number}") for number in range(5)] == [401] * 5
        assert guess("guess") == 429 and guess("open sesame") == 429
        assert "Wrong password from 127.0.0.1" in caplog.text and "guess" not in caplog.text.replace("guesses", "")
        time.sleep(1.1)
        assert guess("open sesame") == 200
    finally:
        stop()


def test_an_empty_password_is_refused_and_not_taken_for_none():
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="`password` is empty"):
            serve("127.0.0.1", password=empty, browser=False)


def test_the_address_is_told_only_once_it_can_be_opened():
    told = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="--port"):
            serve(port=taken.getsockname()[1], browser=False, on_ready=told.append)
    assert told == []


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_another_address_is_not_bound_without_a_password(host):
    with pytest.raises(ValueError, match="`password` is needed"):
        serve(host, browser=False)


def test_this_machines_own_addresses_are_known():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "localhost.example", "")))


@pytest.mark.slow
def test_no_file_of_this_machine_can_be_read(client, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = ["/etc/passwd", str(secret), "pyproject.toml", "../../etc/passwd", "app/server.py"]
    for path in paths:
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
            assert client.get(route + path).status_code in (403, 404), path
    assert client.get("/download/..%2f..%2fetc/all/passwd").status_code == 404


def test_a_path_that_a_client_names_is_not_opened(app, client, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    services, session = app.state.services, session_of(app, client)
    with pytest.raises(ValueError, match="could not be read"):
        list(services.take_file(session, other))
    assert other.exists()
    uploads = app.state.services.uploads
    address = "http://127.0.0.1:1/x.jsonl"
    for path in (str(other), "rows.jsonl", f"{uploads}/../x.jsonl", address, ["x"], {"path": "x"}):
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": 3, "session_hash": "x"}
        for route in ("call/upload", "run/upload", "api/upload", "queue/join"):
            assert client.post(f"/gradio_api/{route}", json=data).status_code == 400, (path, route)
    assert session.inspection is None


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"x" * (2**20 + 1), b"path=/etc/passwd"])
def test_requests_that_are_no_small_json_are_not_taken(client, body):
    assert client.post("/gradio_api/call/check", content=body).status_code == 400


@pytest.mark.slow
def test_uploads_leave_the_common_folder_at_once(app, client):
    rows = '{"prompt": "Say hello.", "completion": "Hello."}\n' * 30
    [path] = client.post("/gradio_api/upload", files={"files": ("mine.jsonl", rows)}).json()
    data = {"path": path, "meta": {"_type": "gradio.FileData"}}
    called = client.post("/gradio_api/call/upload", json={"data": [data]})
    events = client.get(f"/gradio_api/call/upload/{called.json()['event_id']}", timeout=60).text
    assert "event: complete" in events
    session = session_of(app, client)
    assert session.inspection.rows == 30 and session.inspection.path.is_relative_to(session.folder)
    assert not list(app.state.services.uploads.rglob("mine.jsonl"))
    assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    assert client.get(f"/gradio_api/file={session.inspection.path}").status_code in (403, 404)


LABELLED = "".join(json.dumps({"prompt": f"Say {n}.", "completion": "1.", "safe": n % 2}) + "\n" for n in range(4))
TURNS = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("данные (1).jsonl", '{"prompt": "Hi", "completion": "Hello."}', "Using данные"),
        ("rows", '{"prompt": "Hi", "completion": "Hello."}', "upload a file that is one of these formats"),
        ("rows.jsonl.txt", '{"prompt": "Hi", "completion": "Hello."}', "upload a file that is one of these formats"),
        ("rows.csv", "ask,say\nHi,Hello.\n", "Choose the columns with the prompt and the answer under"),
        ("rows.csv", "prompt,completion\nHi,Café\n".encode("latin-1"), "Choose the encoding under"),
        ("rows.jsonl", '{"prompt": "Hi", "completion": "Hello.", "label": false}', "answers to learn"),
        ("rows.jsonl", '{"prompt": "Hi", "chosen": "Hello.", "rejected": "Hi."}', "one answer to learn"),
        ("rows.jsonl", LABELLED, "2 of 4 rows are labelled harmful"),
        ("rows.jsonl", json.dumps({"messages": TURNS}), "the others are context."),
        ("rows.jsonl", '{"prompt": "Hi", "completion": "Hello."}\n{"prompt": "Hi"}', "tick the box below the table"),
        ("rows.json", "[" * 9, "a whole JSON value"),
    ],
)
def test_an_upload_is_told_of_with_advice_that_the_page_has_a_place_for(client, name, content, told):
    [path] = client.post("/gradio_api/upload", files={"files": (name, content)}).json()
    data = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    called = client.post("/gradio_api/call/upload", json={"data": [data]})
    events = client.get(f"/gradio_api/call/upload/{called.json()['event_id']}", timeout=60).text
    shown = html.unescape(str(json.loads(events.rpartition("data: ")[2])))
    assert re.search(told, shown), shown[-2000:]
    assert not re.search(r"on_bad_row|answers='all'|`(columns|encoding|where)\b|ReadOptions|header=True", shown)


@pytest.mark.slow
def test_an_unused_upload_is_private_and_makes_room_for_the_next(app, url, client):
    [first] = client.post("/gradio_api/upload", files={"files": ("mine.jsonl", b"{}")}).json()
    assert client.get(f"/gradio_api/file={first}").status_code == 200
    with httpx.Client(base_url=url) as stranger:
        assert stranger.post("/gradio_api/upload", files={"files": ("x.jsonl", b"{}")}).status_code == 403
        stranger.get("/")
        assert stranger.get(f"/gradio_api/file={first}").status_code == 404
        data = {"data": [{"path": first, "meta": {"_type": "gradio.FileData"}}]}
        assert stranger.post("/gradio_api/call/upload", json=data).status_code == 400
    [second] = client.post("/gradio_api/upload", files={"files": ("mine.jsonl", b"{} ")}).json()
    assert session_of(app, client).uploads == {second}
    assert not Path(first).exists() and Path(second).exists()
    client.post("/gradio_api/upload", files={"files": ("last.jsonl", b"")})


@pytest.mark.slow
def test_a_second_app_of_the_process_leaves_the_uploads_of_the_first_where_they_are(app):
    folder = get_upload_folder()
    second = create_app(Setup())
    assert get_upload_folder() == folder
    assert app.state.services.uploads == second.state.services.uploads == Path(folder)


@pytest.mark.exhaustive
def test_an_idle_server_leaves_the_processor_alone(client):
    time.sleep(0.5)
    start = time.process_time()
    time.sleep(5)
    assert time.process_time() - start < 0.1


def test_uploads_that_wait_have_a_limit_together(app, client):
    folder = app.state.services.uploads / "of-others"
    folder.mkdir()
    try:
        for number in range(21):
            (folder / f"{number}.jsonl").write_bytes(b"x" * 2**20)
        answer = client.post("/gradio_api/upload", files={"files": ("mine.jsonl", b"{} {}")})
        assert answer.status_code == 507
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_what_a_session_keeps_of_uploads_has_a_limit_and_goes_when_it_is_replaced(app, client):
    services, session = app.state.services, session_of(app, client)

    def give(kind):
        [path] = client.post("/gradio_api/upload", files={"files": ("mine.jsonl", b'{"prompt": "Do harm."}')}).json()
        list(services.take_own(session, Path(path), kind, {}))

    for _ in range(3):
        give("harmful_prompts")
        give("benign_prompts")
    assert len(list(session.folder.glob("data-*"))) == 2
    services.drop(session, "benign_prompts")
    assert len(list(session.folder.glob("data-*"))) == 1
    (session.new_folder("data") / "large").write_bytes(b"x" * (4 * 2**20 + 1))
    with pytest.raises(ValueError, match="together take more than 4 MB"):
        give("benign_prompts")


def test_too_large_uploads_are_refused(client):
    answer = client.post("/gradio_api/upload", files={"files": ("big.jsonl", b"x" * (2 * 2**20))})
    assert answer.status_code == 413


def test_names_of_uploads_cannot_leave_their_folder(app, client):
    for name in ("../../evil.jsonl", "/etc/evil.jsonl", "..\\evil.jsonl", "a/../../evil.jsonl"):
        answer = client.post("/gradio_api/upload", files={"files": (name, b"{}")})
        if answer.status_code == 200:
            [path] = answer.json()
            assert path.startswith(str(app.state.services.uploads))


@pytest.mark.slow
def test_errors_do_not_tell_what_went_wrong_inside(client):
    called = client.post("/gradio_api/call/check", json={"data": [False]})
    events = client.get(f"/gradio_api/call/check/{called.json()['event_id']}", timeout=30).text
    assert "Traceback" not in events and "/app/" not in events


@pytest.mark.slow
def test_a_session_gets_no_files_of_another(app, url, client, tmp_path):
    from app.jobs import Job
    from app.recipes import Variant
    from app.setup import EMBEDDED

    session = session_of(app, client)
    job = Job(session.new_folder("job"), EMBEDDED, "train", [Variant("plain", "Plain LoRA")])
    (job.folder / "comparison.html").write_text("<script>alert(1)</script>")
    (job.folder / "plain.yaml").write_text("model: {}")
    (job.folder / "worker.log").write_text("log")
    session.jobs.append(job)
    job._ended.set()
    report, recipe = f"/download/{job.id}/all/report", f"/download/{job.id}/all/recipes"
    own = client.get(report)
    assert own.status_code == 200 and "attachment" in own.headers["content-disposition"]
    assert own.headers["content-type"] == "application/octet-stream"
    assert client.get(recipe).status_code == 200
    for path in (report, recipe):
        assert httpx.get(url + path).status_code == 404  # nobody
        with httpx.Client(base_url=url) as stranger:
            stranger.get("/")
            assert stranger.get(path).status_code == 404
    for path in ("plain/log", "worker.log/recipes", "all/log", "%2e%2e/recipes", "all/..%2fworker.log"):
        assert client.get(f"/download/{job.id}/{path}").status_code == 404


def test_files_of_idle_sessions_are_removed_and_all_at_the_end(tmp_path):
    sessions = Sessions(idle_hours=0.0)
    first = sessions.get(sessions.new_cookie())
    assert first.folder.is_dir() and oct(first.folder.stat().st_mode)[-3:] == "700"
    busy = sessions.get(sessions.new_cookie())
    busy.jobs.append(types.SimpleNamespace(ended=False))
    time.sleep(0.01)
    assert sessions.sweep() == 1
    assert not first.folder.exists() and busy.folder.is_dir()
    sessions.close()
    assert not sessions.folder.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b/c", "https://x.example/a", "app/server.py", "a b/c", "x" * 300]
)
def test_models_are_named_by_ids_and_never_by_paths(name, tmp_path):
    services = Services(Setup(any_model=True), Sessions(tmp_path), None, None)
    with pytest.raises(ValueError, match="not a valid Hub ID"):
        services.model("other", name)


def test_a_folder_of_this_machine_is_not_taken_for_a_model_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a valid Hub ID"):
        Services(Setup(any_model=True), Sessions(tmp_path / "files"), None, None).model("other", "owner/model")


def test_without_a_network_nothing_of_the_hub_is_offered(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    setup = local_setup({"mine": "models/mine"})
    assert list(setup.models) == ["embedded", "mine"] and not setup.any_model and not setup.hub
    services = Services(setup, Sessions(tmp_path), None, tmp_path)
    session = services.sessions.get(services.sessions.new_cookie())
    for work in (
        services.take_dataset(session, "owner/data", "", "train", 1, 10),
        services.take_own(session, None, "xstest", {}),
        services.take_model(session, "other", "owner/model"),
    ):
        with pytest.raises(ValueError, match="not available|no network"):
            list(work)
    assert session.inspection is None and session.own == []


def test_a_space_takes_only_the_models_it_allows(monkeypatch, tmp_path):
    monkeypatch.setenv("ALLOWED_MODELS", "Qwen/Qwen2.5-0.5B-Instruct")
    services = Services(space_setup(), Sessions(tmp_path), None, None)
    assert services.model("Qwen/Qwen2.5-0.5B-Instruct").unaligned == "Qwen/Qwen2.5-0.5B"
    assert services.model("embedded").embedded
    with pytest.raises(ValueError, match="not available here"):
        services.model("other", "evil/model")


def test_nothing_runs_code_that_comes_with_a_model():
    for path in Path(__file__).parents[1].joinpath("app").rglob("*.py"):
        assert not re.search(r"trust_remote_code\s*=\s*True", path.read_text()), path


@pytest.mark.slow
def test_nothing_calls_home(url):
    import os

    config = httpx.get(f"{url}/config").json()
    assert not config["analytics_enabled"] and not config.get("enable_monitoring")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] in ("1", "True")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert httpx.get(f"{url}/monitoring").status_code in (403, 404)
