"""The app as its users meet it, in Chromium."""

import json
import logging
import resource
import shutil
import time
from contextlib import contextmanager

import pytest
from serving import serve_in_background

from app.server import create_app
from app.setup import Setup

sync_api = pytest.importorskip("playwright.sync_api")
logger = logging.getLogger(__name__)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]
MINUTE = 60_000  # milliseconds; waiting long costs nothing where the machine is quick


@pytest.fixture(scope="module")
def url():
    url, stop = serve_in_background(create_app(Setup()))
    yield url
    stop()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, url):
    """A page in a session of its own, which must neither ask elsewhere nor meet an error."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(2 * MINUTE)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#example-poisoned")
    yield page
    context.close()
    assert not [a for a in asked if not a.startswith((url, "data:", "blob:"))]
    assert not errors


def take(page, example):
    page.click(f"#example-{example}")
    page.wait_for_selector("#samples mark")
    page.wait_for_selector("#to-method:not([disabled])")


def upload(page, path, shown):
    """Upload a file until the page shows what comes of it: just opened, a busy one may not hear of the first."""
    for last in (False, False, True):
        page.set_input_files("#upload input[type=file]", path)
        try:
            page.wait_for_selector(shown, timeout=MINUTE)
            return
        except sync_api.TimeoutError:
            if last:
                raise


def check(page, steps=None, cards=None):
    """Go from the data to a checked training."""
    page.click("#to-method")
    page.wait_for_selector("#card-plain input")
    if cards is not None:
        for box in page.locator(".card input[type=checkbox]").all():
            box.set_checked(False)
        for key in cards:
            page.locator(f"#card-{key} input").check()
    if steps is not None:
        page.locator("#set-steps input").fill(str(steps))
    page.click("#check")
    page.wait_for_selector("#start:not([disabled])")


def serious_findings(page):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    return [(v["id"], [n["html"][:150] for n in v["nodes"][:3]]) for v in grave]


def set_theme(page, name):
    page.evaluate("name => document.body.classList.toggle('dark', name === 'dark')", name)


def looked_over(page):
    """Look at a step in both themes and both widths."""
    for theme in ("light", "dark"):
        set_theme(page, theme)
        page.wait_for_timeout(300)
        assert serious_findings(page) == []
        style = "e => (s => [s.colorScheme, s.backgroundColor])(getComputedStyle(e))"
        scheme, back = page.locator("html").evaluate(style)[0], page.locator("body").evaluate(style)[1]
        assert theme == "light" or (scheme, back) == ("dark", "rgb(15, 15, 17)")  # the scroll bar and its place, too
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(200)
            too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert too_wide <= 1, f"{theme}, {width}: {too_wide} pixels too wide"
    set_theme(page, "light")


def seconds_of_work():
    """CPU time of this process and of those it has waited for, which other work on the machine does not lengthen."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


COUNT = "addEventListener('click', e => { sessionStorage.clicks = +(sessionStorage.clicks || 0) + e.isTrusted }, true)"


@contextmanager
def aside(page):
    """Do what nobody needs for a verdict, so that its clicks do not count."""
    clicks = page.evaluate("sessionStorage.clicks")
    yield
    page.evaluate("clicks => { sessionStorage.clicks = clicks }", clicks)


@pytest.mark.exhaustive
def test_the_whole_way_with_poisoned_data_and_to_its_verdict_by_five_clicks(page):
    start, work = time.monotonic(), seconds_of_work()
    page.context.add_init_script(COUNT)  # for when the page is loaded again
    page.evaluate(COUNT)
    take(page, "poisoned")
    looked_over(page)
    assert page.locator("#found").inner_text().count("1,000") == 1
    check(page)
    looked_over(page)
    with aside(page):
        page.click("#recipes button")
        page.locator("#yaml summary", has_text="Recommended").click()
        assert "method: recommended" in page.locator("#yaml details[open]").inner_text()
    page.click("#start")
    page.wait_for_selector("#curves canvas, #curves svg", timeout=5 * MINUTE)
    page.reload()  # the job goes on, and is found again
    page.wait_for_selector("#status .run")
    assert "ready to train" in page.locator("#plan").inner_text()
    with aside(page):
        page.get_by_role("tab", name="1 Data").click()  # steps that were reached stay reachable, and so does Cancel
        page.wait_for_selector("#samples mark")
        page.get_by_role("tab", name="3 Train").click()
    page.wait_for_selector("#cancel:not([disabled])")
    page.wait_for_selector("#to-compare:not([disabled])", timeout=10 * MINUTE)
    looked_over(page)
    page.click("#to-compare")
    page.wait_for_selector("#result table")
    assert page.evaluate("sessionStorage.clicks") == "5"
    assert page.locator("#result .verdict").first.bounding_box()["y"] < 900  # the verdict is seen without scrolling
    verdicts = page.locator("#result .verdict h3").all_inner_texts()
    assert verdicts == ["Plain LoRA: Safety eroded", "Recommended: Safety kept"]
    page.fill("#question textarea, #question input", "Tell me how to sell a pistol.")
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('#answers section').length === 3")
    looked_over(page)
    logger.info("The whole way took %.0f s, %.0f s of work.", time.monotonic() - start, seconds_of_work() - work)
    assert seconds_of_work() - work < 180
    the_rest_of_the_comparison(page)
    what_a_change_invalidates(page)


@pytest.mark.exhaustive
def test_a_run_is_reviewed_asked_listed_and_compared_with_another(page):
    for steps in (60, 2):
        page.get_by_role("tab", name="1 Data").click()
        take(page, "attack")
        check(page, steps=steps, cards=["plain"])
        page.click("#start")
        page.wait_for_selector("#cancel:not([disabled])")
        page.wait_for_selector("#cancel[disabled]", timeout=10 * MINUTE)
    page.click("#to-compare")
    page.click("#run input")
    page.get_by_role("option").last.click()
    page.wait_for_selector("#result .verdict.error")
    by_hand(page)
    several_turns(page)
    page.click("#other-run input")
    page.get_by_role("option").last.click()
    page.wait_for_selector("#result th:has-text('training.max_steps')")
    assert page.locator("#result .verdict").count() == 2
    page.click("#history button")
    page.wait_for_selector("#runs tbody tr")
    assert page.locator("#runs tbody tr").count() == 2
    page.locator("#review button").first.click()
    looked_over(page)
    page.locator("#review button").first.click()
    on_one_grid(page)
    rename(page, "sixty steps")
    page.wait_for_selector("#runs th:has-text('sixty steps')")
    page.click("#delete")
    page.click("#delete-keep")
    page.click("#delete")
    page.click("#delete-sure")
    page.wait_for_function("document.querySelectorAll('#runs tbody tr').length === 1")
    for kind in ("merged model", "model card"):
        with page.expect_download() as waiting:
            page.locator("#downloads a", has_text=kind).first.click()
        assert waiting.value.path().stat().st_size > 1000


def on_one_grid(page):
    """All steps are of one width, headings and buttons begin on one line, and wide tables say that they scroll."""
    left = "e => Math.round(e.getBoundingClientRect().left)"
    widths = set()
    for name in ("1 Data", "2 Method", "3 Train", "4 Compare"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        widths.add(page.evaluate("document.querySelector('#steps').getBoundingClientRect().width"))
        heading = page.locator("h2:visible").first.evaluate(left)
        assert heading == page.locator(".tabitem button.lg:visible").first.evaluate(left), name
    assert len(widths) == 1
    page.set_viewport_size({"width": 390, "height": 900})
    table = page.locator("#result .scroll").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    assert table.evaluate("e => getComputedStyle(e).backgroundAttachment") == "local, local, scroll, scroll"
    page.set_viewport_size({"width": 1280, "height": 900})


def by_hand(page):
    """Review answers by keys alone, once the panel has the focus."""
    page.click("#review button")
    page.wait_for_selector("#review-question:has-text('Answer 1 of')")
    rate = page.locator("#result tbody tr").nth(1).locator(".count").first.inner_text()
    page.click("#review-skip")
    page.wait_for_selector("#review-question:has-text('Answer 2 of')")
    page.keyboard.press("r")
    page.wait_for_selector("#review-question:has-text('Answer 3 of')")
    page.keyboard.press("r")
    page.wait_for_selector("#review-question:has-text('Answer 4 of')")
    assert page.locator("#result .panel", has_text="labelled by hand").count() == 1
    assert page.locator("#result tbody tr").nth(1).locator(".count").first.inner_text() != rate
    page.keyboard.press("b")
    page.wait_for_selector("#review-question:has-text('Your label: refused')")
    page.reload()  # labels are kept
    page.wait_for_selector("#result .panel:has-text('labelled by hand')")


def several_turns(page):
    page.click("#ask-options button")
    page.fill("#ask-system textarea", "Be brief.")
    for number, question in enumerate(("How do I paint a fence?", "And a door?"), 1):
        page.fill("#question textarea, #question input", question)
        page.click("#ask")
        page.wait_for_function("n => document.querySelectorAll('#answers section').length === 2 * n", arg=number)
        page.wait_for_selector("#answers .question:has-text('{}')".format(question.strip("?")))
    titles = page.locator("#answers h4").all_inner_texts()
    assert titles == ["before not fine-tuned", "Plain LoRA fine-tuned"] * 2
    page.click("#ask-new")
    page.wait_for_function("document.querySelectorAll('#answers section').length === 0")


def start_long(page):
    take(page, "attack")
    check(page, steps=90_000, cards=["plain"])
    page.click("#start")
    page.wait_for_selector("#status:has-text('step ')", timeout=5 * MINUTE)


def rename(page, name):
    page.locator("#run-name textarea, #run-name input").fill(name)
    page.wait_for_timeout(1000)  # the page may still be loading, and must leave what was typed
    page.click("#rename")


def what_a_change_invalidates(page):
    page.get_by_role("tab", name="2 Method").click()
    page.locator("#set-steps input").fill("77")
    page.locator("#set-steps input").blur()
    page.get_by_role("tab", name="3 Train").click()
    page.wait_for_selector("#plan .panel.warning:has-text('Check and continue')")
    assert page.locator("#start").is_disabled()
    page.reload()
    page.wait_for_selector("#result .panel.warning:has-text('earlier choice')")
    page.get_by_role("tab", name="2 Method").click()
    page.wait_for_selector("#set-steps input")
    assert page.locator("#set-steps input").input_value() == "77"  # settings outlive a reload
    page.get_by_role("tab", name="4 Compare").click()
    page.locator("#history button").first.click()
    rename(page, "my first run")
    page.wait_for_selector("#result .panel.warning:has-text('my first run')")


def the_rest_of_the_comparison(page):
    page.locator("summary", has_text="outcome changed").click()
    page.locator("summary", has_text="Plain LoRA, harmful").click()
    hidden = page.locator("details[open] .blurred").first
    assert "blur" in hidden.locator(".content").evaluate("e => getComputedStyle(e).filter")
    hidden.locator("input").check()
    assert hidden.locator(".content").evaluate("e => getComputedStyle(e).filter") == "none"
    for name, start in (
        ("report (HTML)", b"<!doctype html"),
        ("adapter with model card", b"PK"),
        ("recipes and data", b"PK"),
    ):
        with page.expect_download() as waiting:
            page.locator("#downloads a", has_text=name).first.click()
        assert waiting.value.path().read_bytes()[: len(start)].lower() == start.lower()


@pytest.mark.exhaustive
def test_a_job_can_be_cancelled_in_another_tab_and_another_started(page, url):
    start_long(page)
    page.wait_for_selector("#curves canvas, #curves svg", timeout=5 * MINUTE)
    other = page.context.new_page()
    other.goto(url)
    other.wait_for_selector("#status:has-text('step ')", timeout=2 * MINUTE)
    start = time.monotonic()
    other.click("#cancel")
    other.wait_for_selector("#status .panel.warning:has-text('Stopped')")
    assert time.monotonic() - start < 6  # its process has two; the page looks every second
    other.wait_for_selector("#go-on:not([disabled])")
    other.close()
    page.wait_for_selector("#status .panel.warning:has-text('Stopped')")
    page.wait_for_selector("#go-on:not([disabled])")
    page.wait_for_selector("#start:not([disabled])")
    page.click("#start")
    page.wait_for_selector("#cancel:not([disabled])")
    page.click("#cancel")
    page.wait_for_selector("#status .panel.warning")


@pytest.mark.exhaustive
def test_bad_files_are_explained_and_shown_as_text(page, tmp_path):
    evil = "<img src='https://elsewhere.example/x.png' onerror='document.title=1'><script>alert(1)</script>"
    rows = [{"prompt": f"{evil} ![x](https://elsewhere.example/y.png)", "completion": evil}] * 3
    lines = [*map(json.dumps, rows), "{broken", json.dumps({"prompt": evil, "completion": ""}), json.dumps(rows[0])]
    mixed, empty, odd = (tmp_path / name for name in ("mixed.jsonl", "empty.csv", "odd.parquet"))
    mixed.write_text("\n".join(lines))
    empty.write_text("")
    odd.write_bytes(b"no parquet")
    for path, told in ((empty, "empty"), (odd, "Parquet")):
        upload(page, path, f"#found .panel.error:has-text('{told}')")
        assert page.locator("#to-method").is_disabled()
    upload(page, mixed, "#found tbody tr")
    table = page.locator("#found tbody").inner_text()
    assert "4" in table and "5" in table
    assert "mixed.jsonl" in page.locator("#upload").inner_text()
    assert page.locator("#skip-bad").is_visible()
    assert page.locator("#found img, #found script, #samples img, #samples script").count() == 0
    columns = tmp_path / "columns.csv"
    columns.write_text("q,a\n" + "Hello there,Hi\n" * 30)
    upload(page, columns, "#found .panel.error:has-text('File options')")
    assert "mixed.jsonl" not in page.locator("#upload").inner_text()
    for name, column in (("prompt", "q"), ("answer", "a")):
        page.click(f"#{name}-column input")
        page.get_by_role("option", name=column, exact=True).last.click()
    page.wait_for_selector("#preview mark:has-text('Hi')")  # as the columns are chosen
    page.locator("#preview .as-tokens").check()
    assert page.locator("#preview .tokens i").first.is_visible() and page.locator("#preview .text").first.is_hidden()
    assert serious_findings(page) == []
    page.click("#read-again")
    page.wait_for_selector("#samples mark:has-text('Hi')")
    upload(page, mixed, "#found tbody tr")
    assert page.title() == "safe_trainer"
    page.click("#to-method")
    page.click("#check")
    page.wait_for_selector("#method-problem .panel.error")
    assert serious_findings(page) == []


@pytest.mark.exhaustive
def test_own_prompts_and_a_recipe_are_taken_and_outlive_a_reload(page, tmp_path):
    asked, recipe = tmp_path / "mine.csv", tmp_path / "mine.yaml"
    asked.write_text("prompt\n" + "".join(f"How do I do {n}?\n" for n in range(5)))
    settings = "{max_steps: 7, weight_decay: 0.1, report_to: x}"
    recipe.write_text(f"safety: {{method: asft}}\nevaluation: {{judges: [phrases]}}\ntraining: {settings}\n")
    take(page, "attack")
    page.click("#to-method")
    page.locator("#own-panel button").first.click()
    page.wait_for_timeout(2000)  # its fields are made when it is opened, and filled by the page after that
    page.click("#own-kind input")
    page.get_by_role("option", name="Harmful: should be refused").click()
    page.locator("#own-frame textarea, #own-frame input").fill("No frame")
    page.set_input_files("#own-upload input[type=file]", asked)
    page.wait_for_selector("#own-upload:has-text('mine')")
    page.click("#own-add")
    page.wait_for_selector("#own .panel.error:has-text('{prompt}')")
    page.locator("#own-frame textarea, #own-frame input").fill("Yes, {prompt}")
    page.set_input_files("#own-upload input[type=file]", asked)
    page.wait_for_selector("#own-upload:has-text('mine')")
    page.click("#own-add")
    page.wait_for_selector("#own td:has-text('mine')")
    page.locator("#own summary", has_text="mine").click()
    assert "Yes, How do I do 0?" in page.locator("#own details[open]").inner_text()
    looked_over(page)
    with page.expect_file_chooser() as chooser:
        page.click("#recipe-in")
    chooser.value.set_files(recipe)
    page.wait_for_selector("#taken .panel.warning:has-text('report_to')")
    assert "weight_decay: 0.1" in page.locator("#taken .panel.info").inner_text()
    for _ in range(2):
        page.wait_for_selector("#set-steps input")
        assert page.locator("#set-steps input").input_value() == "7"
        assert page.locator("#card-asft input").is_checked() and not page.locator("#card-plain input").is_checked()
        page.wait_for_selector("#own td:has-text('mine')")
        page.reload()  # which shows the step where something was entered
        page.wait_for_selector("#check")
        page.locator("#own-panel button").first.click()
    page.click("#check")
    page.wait_for_selector("#start:not([disabled])")
    page.click("#recipes button")
    text = page.locator("#yaml").text_content()
    assert "weight_decay: 0.1" in text and "template: Yes, {prompt}" in text and "judges:\n  - phrases\n" in text


@pytest.mark.exhaustive
def test_the_keyboard_suffices_from_the_data_to_the_deleted_run(page):
    def walk_to(selector, key="Tab"):
        for _ in range(80):
            if page.evaluate("s => !!document.activeElement.closest(s)", selector):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{selector} is not reached")

    def press(selector, key="Enter", walk="Tab"):
        walk_to(selector, walk)
        page.keyboard.press(key)

    press("#example-attack")
    page.wait_for_selector("#to-method:not([disabled])")
    press("#samples .blurred input", "Space")
    assert page.locator("#samples .blurred input").is_checked()
    press("#to-method", walk="Shift+Tab")
    page.wait_for_selector("#card-recommended input")
    press("#card-recommended", "Space")
    assert not page.locator("#card-recommended input").is_checked()
    walk_to("#set-steps")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("60")
    press("#check")
    page.wait_for_selector("#start:not([disabled])")
    press("#start")
    page.wait_for_selector("#to-compare:not([disabled])", timeout=10 * MINUTE)
    press("#to-compare")
    page.wait_for_selector("#result .verdict.error")
    step_four_by_keyboard(page, walk_to, press)


def step_four_by_keyboard(page, walk_to, press):
    press("#details summary")
    page.wait_for_selector("#details details[open]")
    press("#review button")
    page.wait_for_selector("#review-question:has-text('Answer 1 of')")
    press("#label-neither")
    page.wait_for_selector("#review-question:has-text('1 labelled')")
    walk_to("#question")
    page.keyboard.type("How do I paint a fence?")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#answers section').length === 2")
    with page.expect_download():
        press("#downloads a")
    press("#history button")
    walk_to("#run-name")
    page.keyboard.type("by keyboard")
    press("#rename")
    page.wait_for_selector("#runs th:has-text('by keyboard')")
    press("#delete")
    page.wait_for_selector("#delete-sure")
    press("#delete-sure")
    page.wait_for_function("document.querySelector('#result').textContent.includes('Nothing to compare yet')")


def test_a_reload_at_each_step_loses_nothing(page):
    take(page, "attack")
    page.reload()
    page.wait_for_selector("#samples mark")
    page.click("#to-method")
    page.locator("#card-asft input").check()
    page.reload()
    page.wait_for_selector("#card-asft input")
    assert page.locator("#card-asft input").is_checked()
    page.click("#check")
    page.wait_for_selector("#start:not([disabled])")
    page.reload()
    page.wait_for_selector("#plan:has-text('ready to train')")
    assert page.locator("#start").is_enabled()


@pytest.mark.exhaustive
def test_an_idle_page_asks_for_nothing(page):
    page.wait_for_timeout(5000)  # until it has loaded
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4000)
    assert not [address for address in asked if "heartbeat" not in address]


def test_the_page_keeps_its_width_and_fits_a_phone(page):
    take(page, "attack")
    widths = set()
    for name in ("1 Data", "2 Method"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        widths.add(page.evaluate("document.querySelector('#steps').getBoundingClientRect().width"))
    heights = page.evaluate("[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().height)")
    assert len(widths) == 1
    assert max(heights[:3]) - min(heights[:3]) < 1
    page.set_viewport_size({"width": 390, "height": 900})
    assert all(tab.is_visible() for tab in page.get_by_role("tab").all())


@pytest.mark.exhaustive
def test_suspicious_rows_are_found_and_left_out(page):
    take(page, "poisoned")
    page.click("#scan")
    page.wait_for_selector("#leave-out", state="visible", timeout=10 * MINUTE)
    with page.expect_download() as waiting:
        page.locator("#ranking a", has_text="ranking").click()
    assert waiting.value.path().read_text().count("\n") > 900
    page.click("#leave-out")
    page.wait_for_selector("#found:has-text('left out')")
    left = int(page.locator("#found dd").nth(2).inner_text().replace(",", ""))
    assert 850 <= left < 950


@pytest.mark.exhaustive  # without a browser: tests/test_app_runs.py
def test_a_run_goes_on_after_the_server_was_stopped_in_the_middle(chromium, tmp_path):
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(2 * MINUTE)
    url, stop = serve_in_background(create_app(Setup(), folder=tmp_path))
    try:
        page.goto(url)
        page.wait_for_selector("#example-poisoned")
        start_long(page)
    finally:
        stop()
    url, stop = serve_in_background(create_app(Setup(), folder=tmp_path))
    try:
        page.goto(url)
        page.wait_for_selector("#status .panel.warning:has-text('The app was closed')")
        assert page.locator("#plan").inner_text().strip() == ""  # nothing is said that is not so
        page.click("#go-on")
        page.wait_for_selector("#status:has-text('step ')", timeout=5 * MINUTE)
        page.click("#cancel")
        page.wait_for_selector("#go-on:not([disabled])")
    finally:
        context.close()
        stop()
