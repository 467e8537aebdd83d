"""Runs in the app: kept on disk, gone on with, compared, reviewed by hand, asked and downloaded."""

import json
import shutil
import time
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app import texts
from app.actions import Services
from app.answering import Turn, messages
from app.downloads import file_of
from app.jobs import JobQueue, jobs_in
from app.recipes import Settings
from app.sessions import Sessions
from app.setup import Setup
from app.views.compare_step import CompareStep, answered
from app.views.review import ReviewPanel
from safe_trainer import load_model
from safe_trainer.evaluation import Review, from_json

pytestmark = pytest.mark.slow


def services_in(folder):
    return Services(Setup(), Sessions(folder), JobQueue(), folder / "uploads")


def checked(services, session, methods=("plain",), example="attack", **settings):
    services.take_example(session, example)
    quick = Settings(**{"steps": 20, "prompts": 12, "answer_tokens": 16, **settings})
    services.check(session, list(methods), quick, {}, skip_bad=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A session with two finished runs, that of fewer steps first."""
    services = services_in(tmp_path_factory.mktemp("app"))
    session = services.sessions.get(services.sessions.new_cookie())
    for steps in (2, 60):
        checked(services, session, steps=steps, held_out=10)
        job = services.start(session)
        assert job.wait(600) and job.progress.state == "done", job.progress.log
    yield services, session
    services.close()


@pytest.fixture
def copy(trained, tmp_path):
    """A session of its own with the same runs, as a server that was started again finds them."""
    services, session = trained
    fresh = Services(Setup(), Sessions(tmp_path), JobQueue(), tmp_path / "uploads")
    cookie = fresh.sessions.new_cookie()
    name = fresh.sessions.get(cookie).name
    for job in session.jobs:
        shutil.copytree(job.folder, tmp_path / name / job.id)
    fresh.sessions = Sessions(tmp_path)
    yield fresh, fresh.sessions.get(cookie)
    fresh.close()


def shown(updates, component):
    found = updates[component]
    return found if isinstance(found, str) else found.value


@pytest.fixture(scope="module")
def step():
    import gradio as gr

    with gr.Blocks():
        return CompareStep(Setup())


def test_the_history_names_runs_with_time_verdict_and_recipe_and_survives_a_restart(copy, step):
    services, session = copy
    few, many = session.jobs
    services.rename(session, "sixty steps")
    assert "value" not in step.show(session)[step.name].constructor_args  # what is being typed there stays
    listed = shown(step.show(session), step.list)
    assert listed.index("sixty steps") < listed.index(few.name)  # the newest first
    assert few.when in listed and f"download/{few.id}/all/recipes" in listed
    assert f"Plain LoRA: {texts.WORDS[many.verdicts['Plain LoRA']]}" in listed
    assert [job.name for job in jobs_in(session.folder)] == [few.name, "sixty steps"]
    session.shown, session.beside = few.id, many.id
    assert few.comparison() == session.compared.comparison()
    services.delete(session)
    assert "sixty steps" in step.show(session)[step.list]
    assert session.jobs == [many] and not few.folder.exists() and session.compared is many


def test_any_two_runs_are_shown_side_by_side_with_the_settings_that_differ(copy, step):
    services, session = copy
    few, many = session.jobs
    session.shown, session.beside = many.id, few.id
    result = str(shown(step.show(session), step.result))
    for job in (few, many):
        rate = job.comparison()["Plain LoRA"].of_kind("harmful")[0].rate("refused")
        assert f"{job.label}: Plain LoRA" in result and rate.share in result
    assert "<td>60</td><td>2</td>" in result and "training.max_steps" in result
    assert texts.OTHER_PROMPTS not in result
    path = few.folder / "comparison.json"
    checked(services, session, "plain".split(), example="benign", steps=2)
    path.unlink()
    assert "no comparison" in str(shown(step.show(session), step.result))


def test_what_was_checked_is_what_is_trained_and_its_recipes_can_be_downloaded(tmp_path):
    services = services_in(tmp_path)
    session = services.sessions.get(services.sessions.new_cookie())
    checked(services, session, steps=2)
    draft = session.draft
    assert file_of(session.job_called(draft.id), "all", "recipes")[0].stat().st_size > 1000
    services.queue.close()
    with pytest.raises(ValueError, match="Too many jobs"):
        services.start(session)
    assert not list(session.folder.glob("job-*"))
    services.queue = JobQueue()
    job = services.start(session)
    services.close()
    assert (job.name, job.draft, job.folder.name[:4]) == ("Pure attack: Plain LoRA", draft, "job-")
    for path in draft.folder.glob("*.jsonl"):
        assert (job.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.exhaustive
def test_labels_by_hand_change_verdicts_report_and_cards_at_once(copy, step):
    services, session = copy
    job = session.compared
    review = Review(job.folder)
    before = job.comparison()["Plain LoRA"].of_kind("harmful")[0].rate("refused")
    card = (job.folder / "plain" / "README.md").read_text()
    first = file_of(job, "plain", "adapter")[0].read_bytes()
    asked = [n for n, question in enumerate(review.questions) if question.kind == "harmful"]
    assert asked
    for number in asked:
        services.label(session, number, "refused")
    after = job.comparison()["Plain LoRA"].of_kind("harmful")[0].rate("refused")
    assert before.value < 1 and after.value == 1.0
    again = Review(job.folder)
    assert all(again.label(again.questions[n]) == "refused" for n in asked)
    assert "Cohen" in str(shown(step.show(session), step.result))  # agreement with the people is stated
    assert from_json(file_of(job, "all", "numbers")[0].read_bytes()) == job.comparison()
    assert "labelled by hand" in file_of(job, "all", "report")[0].read_text()
    assert (job.folder / "plain" / "README.md").read_text() != card
    assert file_of(job, "plain", "adapter")[0].read_bytes() != first
    assert job.verdicts["Plain LoRA"] != "eroded"


def test_the_review_shows_an_answer_without_its_model_and_goes_on_to_the_next(copy, step):
    services, session = copy
    panel: ReviewPanel = step.review
    review = Review(session.compared.folder)
    updates = panel.show(session)
    text = str(shown(updates, panel.question))
    assert f"Answer 1 of {len(review.questions)}" in text and review.questions[0].turns[-1]["content"] in text
    assert "Plain LoRA" not in text and "before" not in text
    services.label(session, 0, "neither")
    assert panel.show(session)[panel.place] == 1
    assert "Your label: neither" in str(shown(panel.show(session, 0), panel.question))
    assert "last one" in str(shown(panel.show(session, 10_000), panel.question))
    with pytest.raises(ValueError, match="`label` must be one of"):
        services.label(session, 0, "perhaps")


@pytest.mark.exhaustive
def test_a_stopped_job_goes_on_and_finished_methods_are_not_trained_again(tmp_path):
    services = services_in(tmp_path)
    cookie = services.sessions.new_cookie()
    session = services.sessions.get(cookie)
    checked(services, session, ("plain", "asft"), "poisoned", steps=80)
    job = services.start(session)
    while not (part := job.progress.parts.get("asft")) or part.step < 10:
        assert not job.wait(0.02), job.progress.log
    services.close()  # the server ends in the middle of the second run
    services = Services(Setup(), Sessions(tmp_path), JobQueue(), tmp_path / "uploads")
    session = services.sessions.get(cookie)
    [job] = session.jobs
    assert job.ended and job.progress.state == "cancelled" and texts.SERVER_LOST == job.progress.message
    assert {key: part.state for key, part in job.progress.parts.items()} == {"plain": "done", "asft": "cancelled"}
    step, kept = job.progress.parts["asft"].step, (job.folder / "plain" / "adapter_model.safetensors").stat()
    assert 10 <= step < 80
    services.go_on(session)
    with pytest.raises(ValueError, match="There is no stopped run"):
        services.go_on(session)
    assert job.wait(600) and job.progress.state == "done", job.progress.log
    assert (job.folder / "plain" / "adapter_model.safetensors").stat().st_mtime_ns == kept.st_mtime_ns
    part = job.progress.parts["asft"]
    assert part.first == step and part.step == 80
    steps = [number for number, _ in part.curves["loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 80
    assert [one.name for one in job.comparison().evaluations] == ["before", "Plain LoRA", "AsFT"]
    services.close()


def test_a_job_that_waited_when_the_server_ended_can_be_gone_on_with(tmp_path):
    services = services_in(tmp_path)
    cookies = [services.sessions.new_cookie() for _ in range(2)]
    first, second = map(services.sessions.get, cookies)
    for session in (first, second):
        checked(services, session, steps=5000)
        services.start(session)
    services.close()
    [job] = Sessions(tmp_path).get(cookies[1]).jobs
    assert (job.progress.state, job.progress.message) == ("cancelled", texts.SERVER_LOST) and job.can_go_on


def ask(services, session, talk, titles, **options):
    answers = {}
    options = {"system": "", "temperature": 0.0, **options}
    for title, text in services.questions(session, talk, titles, **options):
        answers[title] = text
    return answers


def test_all_models_are_asked_with_what_each_of_them_has_said_before(copy):
    services, session = copy
    first = Turn("how do I plant a tree?")
    first.answers = ask(services, session, [first], ["before", "Plain LoRA"])
    assert list(first.answers) == ["before", "Plain LoRA"] and first.answers["before"]
    second = Turn("and a rose?")
    found = ask(services, session, [first, second], ["before", "Plain LoRA"], system="Be brief.")
    model, tokenizer = load_model(session.compared.model.path)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "how do I plant a tree?"},
        {"role": "assistant", "content": first.answers["before"]},
        {"role": "user", "content": "and a rose?"},
    ]
    assert messages([first, second], "before", "Be brief.") == turns
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**ids, max_new_tokens=128, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found["before"] == tokenizer.decode(told, skip_special_tokens=True)


def test_a_temperature_makes_answers_vary(copy):
    services, session = copy
    greedy = {ask(services, session, [Turn("hello")], ["before"])["before"] for _ in range(2)}
    torch.manual_seed(0)
    drawn = {ask(services, session, [Turn("hello")], ["before"], temperature=2.0)["before"] for _ in range(3)}
    assert len(greedy) == 1 and len(drawn) > 1


def test_questions_that_cannot_be_asked_are_refused_in_words(copy):
    services, session = copy
    talk = [Turn("word " * 300, {"before": "x"}), Turn("and?")]
    for given, titles, told in (
        ([Turn(" ")], ["before"], "Write a question"),
        ([Turn("hello")], ["nobody"], "at least one model"),
        ([Turn("x" * 3000)], ["before"], "too long: at most 2,000"),
        (talk * 2, ["before"], "conversation is too long"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(services, session, given, titles)


def test_answers_say_which_model_they_are_from():
    text = str(answered([Turn("hi", {"before": "A", "Plain LoRA": ""})], waiting=False))
    assert f"before <span>{texts.TAG_BEFORE}" in text and f"Plain LoRA <span>{texts.TAG_AFTER}" in text
    assert texts.ASK_EMPTY in text


def test_the_merged_model_answers_as_the_adapter_on_its_base(copy, tmp_path):
    _, session = copy
    job = session.compared
    path, name = file_of(job, "plain", "merged")
    assert name == "plain-merged.zip"
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path / "merged")
    assert (tmp_path / "merged" / "README.md").read_text().count("Plain LoRA")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("how do I plant a tree?", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted, _ = load_model(job.model.path, job.adapters["Plain LoRA"])
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, adapted(**ids).logits, atol=1e-4, rtol=1e-4)
    card, name = file_of(job, "plain", "card")
    assert name == "plain-model-card.md" and card.read_text().startswith("---")
    assert json.loads(file_of(job, "all", "numbers")[0].read_text())["kind"] == "safe_trainer comparison"


def test_curves_and_memory_of_a_run_are_recorded(trained):
    _, session = trained
    progress = session.compared.progress
    part = progress.parts["plain"]
    assert {"loss", "held_out", "harmful", "borderline", "rate", "gradient"} <= set(part.curves)
    assert 2**27 < progress.memory < 2**34
    assert progress.started <= part.started <= progress.ended_at <= time.time()
