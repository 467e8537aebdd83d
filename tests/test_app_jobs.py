"""The app's jobs, without its interface."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from app import jobs
from app.actions import Services
from app.answering import Answerer
from app.inspection import Inspection
from app.jobs import Job, JobQueue, train_job
from app.materials import OwnFile, take
from app.progress import CLEANED, JOB, PROGRESS, SCAN, Progress
from app.recipe_in import read_settings
from app.recipes import Choices, Settings, Variant
from app.sessions import Sessions
from app.setup import EMBEDDED, EXAMPLES, Limits, Model, Setup
from app.views import compare_step, data_step, train_step
from app.worker import examine
from safe_trainer import recipe


def choices(folder, protections=("plain",), example="attack", **settings):
    data = folder / "given.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES[example].make()))
    quick = Settings(**{"steps": 20, "prompts": 12, **settings})
    return Choices(EMBEDDED, data, protections, quick, example=EXAMPLES[example])


@pytest.fixture
def queue():
    queue = JobQueue()
    yield queue
    queue.close()


@pytest.mark.slow
def test_a_job_trains_every_variant_and_compares_them_whatever_becomes_of_one(tmp_path, queue):
    job = train_job(tmp_path / "job", choices(tmp_path, ("plain", "salora", "asft"), "poisoned"))
    broken = (tmp_path / "job" / "salora.yaml").read_text().replace("method: salora", "method: salora\n  rank: -1")
    (tmp_path / "job" / "salora.yaml").write_text(broken)
    queue.submit(job)
    assert job.wait(600)
    assert job.progress.state == "done", job.progress.log
    states = {key: part.state for key, part in job.progress.parts.items()}
    assert states == {"plain": "done", "salora": "failed", "asft": "done"}
    assert "rank" in job.progress.parts["salora"].message and str(tmp_path) not in job.progress.parts["salora"].message
    assert [e.name for e in job.comparison().evaluations] == ["before", "Plain LoRA", "AsFT"]
    assert {"loss", "penalty", "harmful"} <= set(job.progress.parts["asft"].curves)
    assert job.progress.parts["plain"].step == 20
    assert job.progress.start_rate() == 1.0
    card = (tmp_path / "job" / "asft" / "README.md").read_text()
    assert "AsFT" in card and "refus" in card.lower() and str(tmp_path) not in card


@pytest.mark.slow
def test_cancel_ends_training_after_its_step_with_a_checkpoint(tmp_path, queue):
    job = train_job(tmp_path / "job", choices(tmp_path, steps=100_000))
    queue.submit(job)
    while job.progress.phase != "training" or not job.progress.parts["plain"].step:
        assert not job.wait(0.05), job.progress.log
    queue.cancel(job)
    assert job.wait(jobs.SAVING)
    assert job.progress.state == "cancelled" and job.can_go_on
    assert list((tmp_path / "job" / "plain").glob("checkpoint-*/adapter_model.safetensors"))


def worker(tmp_path, monkeypatch, source):
    """A job whose process runs `source` instead of training."""
    package = tmp_path / "fake"
    package.mkdir()
    (package / "worker.py").write_text("import json, os, sys, time, signal\nfolder = sys.argv[1]\n" + source)
    monkeypatch.setattr(jobs, "__package__", "fake")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "job"
    folder.mkdir()
    return Job(folder, EMBEDDED, "train", [Variant("plain", "Plain LoRA")])


@pytest.mark.slow
def test_a_process_that_does_not_listen_is_killed_within_two_seconds(tmp_path, monkeypatch, queue):
    job = worker(tmp_path, monkeypatch, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
    queue.submit(job)
    while job.progress.state != "running":
        time.sleep(0.02)
    queue.cancel(job)
    assert job.wait(3.0)
    assert job.progress.state == "cancelled"


@pytest.mark.slow
def test_the_clock_runs_before_the_process_has_reported_anything(tmp_path, monkeypatch, queue):
    job = worker(tmp_path, monkeypatch, "time.sleep(600)")
    queue.submit(job)
    while job.progress.state != "running":
        time.sleep(0.02)
    first = job.progress.seconds
    time.sleep(0.3)
    assert job.progress.seconds > first
    assert not train_step._status(job, 0).count("in the queue")  # nobody is before it


def test_a_process_that_dies_is_told_of_and_frees_the_queue(tmp_path, monkeypatch, queue):
    job = worker(tmp_path, monkeypatch, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    queue.submit(job)
    assert job.wait(30)
    assert job.progress.state == "failed" and "memory" in job.progress.message
    while queue.place(job) is not None:
        time.sleep(0.02)


def test_what_a_process_started_ends_with_it(tmp_path, monkeypatch, queue):
    source = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(folder + '/child', 'w').write(str(child.pid))\n"
        "os._exit(0)"
    )
    job = worker(tmp_path, monkeypatch, source)
    queue.submit(job)
    assert job.wait(30)
    child = int((job.folder / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
            state = open(f"/proc/{child}/stat").read().split(")")[1].split()[0]
        except (OSError, IndexError):
            return
        if state == "Z":  # dead, and only not yet collected by whoever took it over
            return
        time.sleep(0.05)
    raise AssertionError("its child lives on")


class Waiting(Job):
    """A job that does nothing until it is let go."""

    def run(self):
        self.progress.begin()
        while not self.let_go.wait(0.01) and self._cancelled_at is None:
            pass
        self.progress.end("cancelled" if self._cancelled_at else "done")
        self._ended.set()


def waiting(tmp_path, name):
    (tmp_path / name).mkdir()
    job = Waiting(tmp_path / name, EMBEDDED)
    job.let_go = threading.Event()
    return job


def test_one_job_runs_and_the_others_know_their_place(tmp_path, queue):
    first, second, third = (waiting(tmp_path, name) for name in "abc")
    for job in (first, second, third):
        queue.submit(job)
    while first.progress.state != "running":
        time.sleep(0.01)
    assert [queue.place(job) for job in (first, second, third)] == [0, 1, 2]
    assert second.progress.state == third.progress.state == "waiting"
    queue.cancel(second)
    assert second.ended and queue.place(third) == 1
    first.let_go.set()
    third.let_go.set()
    assert third.wait(5) and third.progress.state == "done"


def test_a_full_queue_says_so_and_a_closed_one_ends_everything(tmp_path):
    queue = JobQueue(limit=1)
    jobs = [waiting(tmp_path, name) for name in "abc"]
    queue.submit(jobs[0])
    queue.submit(jobs[1])
    with pytest.raises(ValueError, match="Too many jobs"):
        queue.submit(jobs[2])
    jobs[0].let_go.set()
    while queue.place(jobs[0]) is not None:
        time.sleep(0.01)
    queue.submit(jobs[2])  # as it advises
    queue.close()
    assert all(job.ended and job.progress.state == "cancelled" for job in jobs[1:])
    with pytest.raises(ValueError):
        queue.submit(jobs[2])


def test_progress_is_what_its_process_has_written(tmp_path):
    assert Progress.read(tmp_path) is None
    progress = Progress({"plain": "Plain LoRA"})
    progress.begin()
    progress.turn("plain", "running")
    progress.enter("training", "plain")
    part = progress.part("plain")
    part.started, part.first, part.step, part.total = time.time() - 10, 10, 20, 30
    progress.point("plain", {"step": 5, "loss": 1.5, "safety/harmful_refused": 0.5, "learning_rate": 1.0})
    progress.write(tmp_path)
    found = Progress.read(tmp_path)
    assert found.parts["plain"].curves == {"loss": [[5, 1.5]], "harmful": [[5, 0.5]], "rate": [[5, 1.0]]}
    assert found.seconds_left() == pytest.approx(10, abs=1)
    progress.end("failed", "no memory")
    progress.write(tmp_path)
    found = Progress.read(tmp_path)
    assert found.ended and found.message == "no memory" and "no memory" in found.log[-1]
    assert found.parts["plain"].state == "failed"
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS]  # written complete, or not at all


def test_sets_of_one_kind_share_a_curve_by_how_many_of_each_were_judged():
    progress = Progress({"plain": "Plain LoRA"})
    first = {"harmful: many_refused": 0.9, "harmful: many_judged": 30, "harmful: few_refused": 0.5}
    first |= {"harmful: few_judged": 10, "harmful: none_judged": 0, "harmful: many_refused_low": 0.1}
    first |= {"borderline_refused": 0.25, "borderline_judged": 4, "benign_refused": 0.0, "benign_judged": 4}
    for step, many in ((0, 0.9), (5, 0.1)):
        rates = {f"safety/{name}": value for name, value in first.items()} | {"safety/harmful: many_refused": many}
        progress.point("plain", {"step": step, "loss": 1.0, **rates})
    curves = progress.parts["plain"].curves
    assert curves["harmful"] == [(0, pytest.approx((27 + 5) / 40)), (5, pytest.approx((3 + 5) / 40))]
    assert curves["borderline"] == [(0, 0.25), (5, 0.25)] and curves["loss"] == [(0, 1.0), (5, 1.0)]
    assert set(curves) == {"harmful", "borderline", "loss"}
    assert progress.start_rate() == pytest.approx(0.8)


def test_runs_of_an_earlier_server_are_found_again(tmp_path):
    sessions = Sessions(tmp_path)
    cookie = sessions.new_cookie()
    session = sessions.get(cookie)
    for number, states in enumerate((("done",), ())):
        job = Job(session.new_folder("job"), EMBEDDED, "train", [Variant("plain", "Plain LoRA")], f"run {number}")
        job.made = float(number)
        job.save()
        job.progress.begin()
        job.progress.part("plain").step = 3
        for state in states:
            job.progress.end(state)
        job.progress.write(job.folder)
    (session.new_folder("job") / JOB).write_text("{broken")
    session.new_folder("draft")
    later = Sessions(tmp_path)
    found = later.get(cookie).jobs
    assert [(job.name, job.progress.state, job.ended) for job in found] == [
        ("run 0", "done", True),
        ("run 1", "cancelled", True),
    ]
    assert "closed before" in found[1].progress.message and found[1].progress.parts["plain"].step == 3
    assert found[1].can_go_on and not found[0].can_go_on
    assert not list(session.folder.glob("draft-*"))
    assert not later.get(cookie).busy
    later.sweep()
    assert session.folder.is_dir()
    assert Sessions(tmp_path / "other").get(cookie) is None


@pytest.mark.slow
def test_what_was_chosen_is_found_again_by_the_next_server(tmp_path):
    services = Services(Setup(), Sessions(tmp_path), None, tmp_path / "uploads")
    cookie = services.sessions.new_cookie()
    session = services.sessions.get(cookie)
    services.take_example(session, "attack")
    rows = session.new_folder("data") / "mine.jsonl"
    rows.write_text('{"prompt": "How do I do harm?"}\n')
    session.own = [OwnFile(rows, "harmful_data", "mine", 1)]
    session.own += take(rows, "mine.jsonl", "harmful", {"template": "Yes, {prompt}"}, Limits(), rows.parent)
    session.form = {"steps": 7, "use.plain": False}
    session.taken = read_settings("training: {weight_decay: 0.1}", "mine.yaml")
    services.check(session, ["plain"], Settings(steps=2, prompts=5), {}, skip_bad=False)
    session.save()
    later = Sessions(tmp_path).get(cookie)
    assert (later.model, later.form, later.own) == (session.model, session.form, session.own)
    assert later.inspection.path.is_file() and later.inspection.example == EXAMPLES["attack"]
    assert data_step.described(later.inspection, 10) == data_step.described(session.inspection, 10)
    assert data_step.samples(later.inspection.samples) == data_step.samples(session.inspection.samples)
    assert [(one.name, one.said) for one in later.asked] == [("mine", {"template": "Yes, {prompt}"})]
    assert later.taken.kept == {"training.weight_decay": 0.1}
    assert later.draft is None and not list(later.folder.glob("draft-*"))  # what was checked is checked again
    (later.folder / "chosen.json").write_text("{broken")
    assert Sessions(tmp_path).get(cookie).inspection is None


def scanned(folder):
    """Services and a session that has scanned its rows: three of them look harmful."""
    services = Services(Setup(), Sessions(folder / "sessions"), JobQueue(), folder / "uploads")
    session = services.sessions.get(services.sessions.new_cookie())
    session.inspection = upload(session)
    services.queue.submit = lambda job: job._ended.set()
    job = services.scan(session)
    found = {"scored": 5, "above": 3, "threshold": 0.5, "top": []}
    (job.folder / SCAN).write_text(json.dumps(found))
    (job.folder / CLEANED).write_text('{"prompt": "Kept?", "completion": "Yes."}\n')
    job.progress.end("done")
    return services, session


def upload(session, **reading):
    """What is found in a fresh upload that is called as the ones before."""
    path = session.new_folder("data") / "given.jsonl"
    path.write_text('{"prompt": "New?", "completion": "Yes."}\n')
    return Inspection(path, "data.jsonl", reading=reading, rows=1)


@pytest.mark.slow
def test_suspicious_rows_are_left_out_of_the_file_that_was_scanned_alone(tmp_path, monkeypatch):
    import gradio as gr

    with gr.Blocks():
        step = data_step.DataStep(Setup())
    services, session = scanned(tmp_path)
    monkeypatch.setattr(services, "_read", lambda session, path, *rest: iter([path.read_text()]))
    first = session.inspection
    shown = step.show_scan(session)
    assert shown[step.leave_out].visible and "3 of 5 rows" in shown[step.ranking]
    assert "Kept?" in next(services.leave_out(session))
    others = {"columns": {"prompt": "q", "answer": "a"}}
    for now in (upload(session), replace(first, reading=others), None):  # the name and even the file may be the same
        session.inspection = now
        shown = step.show_scan(session)
        assert not shown[step.leave_out].visible and not shown[step.ranking]
        with pytest.raises(ValueError, match="Nothing chosen"):
            next(services.leave_out(session))
    session.job("scan")._ended.clear()  # one that is under way is shown, and can be stopped, whatever is chosen by now
    shown = step.show_scan(session)
    assert shown[step.stop].visible and shown[step.ranking]


def test_a_judge_is_one_of_the_models_that_can_be_chosen_here(tmp_path):
    guard = {"mine": Model("mine", EMBEDDED.path)}
    services = Services(Setup({EMBEDDED.key: EMBEDDED, **guard}), Sessions(tmp_path), None, tmp_path)
    assert services.judges(Settings()) == ("phrases", "likelihood")
    assert services.judges(Settings(judge="phrases")) == ("phrases",)
    assert services.judges(Settings(judge="guard", guard="wildguard:mine")) == (
        f"wildguard:{EMBEDDED.path}",
        "phrases",
    )
    for named in ("guard:/etc/passwd", "../models", "wildguard:owner/guard"):
        with pytest.raises(ValueError, match="not available here"):
            services.judges(Settings(judge="guard", guard=named))
    with pytest.raises(ValueError, match="owner/name"):
        services.judges(Settings(judge="guard"))


@pytest.mark.slow
def test_the_comparison_and_questions_load_the_model_as_training_did(tmp_path, monkeypatch):
    asked = []

    def load(path, **options):
        asked.append((path, options))
        raise InterruptedError

    monkeypatch.setattr("safe_trainer.load_model", load)
    job = train_job(tmp_path / "job", replace(choices(tmp_path), kept={"model.dtype": "float32"}))
    monkeypatch.chdir(job.folder)
    for bits in (None, "8bit", "4bit"):
        kept = {"model.dtype": "float32"} | ({"model.quantization": bits} if bits else {})
        train_job(job.folder, replace(choices(tmp_path), kept=kept))
        trained = recipe.read_recipe("plain.yaml")
        with pytest.raises(InterruptedError):
            examine({"Plain LoRA": "plain"}, Progress())
        with pytest.raises(InterruptedError):
            next(Answerer().ask(EMBEDDED, {"before": None}, {}, 1, options=job.loading()))
        for path, options in asked:
            quantization = options.pop("quantization_config", None)
            assert (path, options.pop("dtype")) == (trained.parts.model.path, "float32")
            assert options in ({}, {"trust_remote_code": False})
            assert (quantization is None) is (bits is None)
            assert bits is None or getattr(quantization, f"load_in_{bits}")
        asked.clear()


@pytest.mark.exhaustive
def test_own_prompts_are_asked_drawn_and_judged_by_whom_the_user_chose(tmp_path, queue):
    own = []
    for name, kind in (("first", "harmful"), ("second", "harmful"), ("third", "task")):
        path = tmp_path / name / f"{name}.jsonl"
        path.parent.mkdir()
        row = {"prompt": f"Tell me how to {name} it.", "completion": "Sorry."}
        path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
        own += take(path, path.name, kind, {"scorer": "exact"}, Limits(), path.parent)
    order = replace(choices(tmp_path, steps=5, prompts=5), asked=own, judges=["phrases"])
    job = train_job(tmp_path / "job", order)
    queue.submit(job)
    assert job.wait(600) and job.progress.state == "done", job.progress.log
    results = job.comparison().before.results
    names = ["harmful: first", "harmful: second", "benign", "borderline", "task: third"]
    assert [result.prompt_set.name for result in results] == names
    assert list(results[0].verdicts) == ["phrases"]
    assert job.progress.start_rate() is not None and job.progress.parts["plain"].curves["harmful"]
    assert "/10)" in compare_step.described({"": job.comparison()}, embedded=True)
