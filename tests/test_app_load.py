"""Many people at once: nothing is lost, nothing is mixed up, nobody waits for ever."""

import os
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import serve_in_background

from app.recipes import Settings
from app.server import create_app
from app.sessions import COOKIE
from app.setup import Setup

pytestmark = pytest.mark.exhaustive
CLIENTS, TRAINING = 20, 5


def memory():
    """Return the megabytes that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ask(client, number):
    """Ask one question of one's own, and return everything that was said on the way."""
    job = client.submit(f"How do I paint fence number {number}?", ["before"], None, 0, api_name="/ask")
    job.result(timeout=300)
    return job.outputs()


def test_twenty_ask_and_five_train_at_the_same_time():
    from gradio_client import Client

    app = create_app(Setup())
    services = app.state.services
    url, stop = serve_in_background(app)
    try:
        cookies = [httpx.get(url).cookies[COOKIE] for _ in range(CLIENTS)]
        sessions = [services.sessions.get(cookie) for cookie in cookies]
        clients = [
            Client(url, headers={"cookie": f"{COOKIE}={cookie}"}, verbose=False, analytics_enabled=False)
            for cookie in cookies
        ]
        for number, session in enumerate(sessions[:TRAINING]):
            services.take_example(session, "attack")
            services.check(session, ["plain"], Settings(steps=2 + number, prompts=5), {}, skip_bad=False)
        with ThreadPoolExecutor(CLIENTS) as pool:
            started = [pool.submit(c.predict, api_name="/start") for c in clients[:TRAINING]]
            asked = [pool.submit(ask, client, number) for number, client in enumerate(clients)]
            said = [one.result(timeout=400) for one in asked]
            for one in started:
                one.result(timeout=400)
        assert all('class="before"' in outputs[-1][0] for outputs in said)
        before = None
        for number, session in enumerate(sessions[:TRAINING]):
            [job] = session.jobs
            assert job.wait(600) and job.progress.state == "done", job.progress.message
            assert job.progress.parts["plain"].total == 2 + number
            assert job.folder.is_relative_to(session.folder) and job.comparison() is not None
            before = before or memory()
        assert memory() - before < 60  # what a job takes, goes with its process
        assert not any(session.jobs for session in sessions[TRAINING:])
        assert len({session.folder for session in sessions}) == CLIENTS
    finally:
        stop()
    assert not services.sessions.folder.exists()
