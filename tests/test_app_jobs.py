"""The app's jobs, without its interface."""

import json
import time

import pytest

from app.catalogue import EMBEDDED, EXAMPLES
from app.jobs import JobQueue, train_job
from app.orders import Choices, Settings


def choices(folder, protections=("plain",), example="attack", **settings):
    data = folder / "given.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES[example].make()))
    return Choices(EMBEDDED, data, protections, Settings(**{"steps": 20, "prompts": 12, **settings}), EXAMPLES[example])


@pytest.fixture
def queue():
    queue = JobQueue()
    yield queue
    queue.close()


@pytest.mark.slow
def test_a_job_trains_every_variant_and_compares_them(tmp_path, queue):
    job = train_job(tmp_path / "job", choices(tmp_path, ("plain", "asft"), "poisoned"))
    queue.submit(job)
    assert job.wait(120)
    print("\n".join(job.progress.log), job.progress.parts)
    assert job.progress.state == "done"
    assert [e.name for e in job.comparison().evaluations] == ["before", "plain LoRA", "AsFT"]


@pytest.mark.slow
def test_cancel_stops_within_two_seconds_and_keeps_a_checkpoint(tmp_path, queue):
    job = train_job(tmp_path / "job", choices(tmp_path, steps=100_000))
    queue.submit(job)
    while job.progress.phase != "training" or not job.progress.parts["plain"].step:
        assert not job.wait(0.05), job.progress.log
    start = time.monotonic()
    queue.cancel(job)
    assert job.wait(2.0)
    print(time.monotonic() - start, job.progress.log)
    assert job.progress.state == "cancelled"
    assert list((tmp_path / "job" / "plain").glob("checkpoint-*/adapter_model.safetensors"))
