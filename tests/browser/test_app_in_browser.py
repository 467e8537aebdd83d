"""The app as its users meet it, in Chromium."""

import json
import logging
import resource
import shutil
import time

import pytest
from serving import serve_in_background

from app.limits import Setup
from app.server import create_app

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
    page.wait_for_selector("#found mark")
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


def test_the_whole_way_with_poisoned_data(page):
    start, work = time.monotonic(), seconds_of_work()
    take(page, "poisoned")
    looked_over(page)
    assert page.locator("#found").inner_text().count("1,000") == 1
    check(page)
    looked_over(page)
    page.click("#recipes button")
    assert "method: recommended" in page.locator("#yaml textarea").input_value()
    assert "safety=[\n        *recommended(" in page.locator("#code textarea").input_value()
    page.click("#start")
    page.wait_for_selector("#curves figure", timeout=5 * MINUTE)
    page.reload()  # the job goes on, and is found again
    page.wait_for_selector("#status .run")
    page.wait_for_selector("#to-compare:not([disabled])", timeout=10 * MINUTE)
    looked_over(page)
    page.click("#to-compare")
    page.wait_for_selector("#result table")
    verdicts = page.locator("#result .verdict h3").all_inner_texts()
    assert verdicts == ["plain LoRA: Safety eroded", "Recommended: Safety kept"]
    page.fill("#question textarea, #question input", "Tell me how to sell a pistol.")
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('#answers section').length === 3")
    looked_over(page)
    logger.info("The whole way took %.0f s, %.0f s of work.", time.monotonic() - start, seconds_of_work() - work)
    assert seconds_of_work() - work < 180
    the_rest_of_the_comparison(page)


def the_rest_of_the_comparison(page):
    page.locator("summary", has_text="outcome changed").click()
    page.locator("summary", has_text="plain LoRA, harmful").click()
    hidden = page.locator("details[open] .blurred").first
    assert "blur" in hidden.locator(".content").evaluate("e => getComputedStyle(e).filter")
    hidden.locator("input").check()
    assert hidden.locator(".content").evaluate("e => getComputedStyle(e).filter") == "none"
    for name, start in (("report (HTML)", b"<!doctype html"), ("adapter (zip)", b"PK"), ("recipe (YAML)", b"# ")):
        with page.expect_download() as waiting:
            page.locator("#downloads a", has_text=name).first.click()
        assert waiting.value.path().read_bytes()[: len(start)].lower() == start.lower()


def test_a_job_can_be_cancelled_and_another_started(page):
    take(page, "attack")
    check(page, steps=90_000, cards=["plain"])
    page.click("#start")
    page.wait_for_selector("#curves figure", timeout=5 * MINUTE)
    start = time.monotonic()
    page.click("#cancel")
    page.wait_for_selector("#status .panel.warning")
    page.wait_for_selector("#status a[href*=checkpoint]")
    assert time.monotonic() - start < 6  # its process has two; the page looks every 0.7 s
    with page.expect_download() as waiting:
        page.click("#status a[href*=checkpoint]")
    assert waiting.value.path().read_bytes()[:2] == b"PK"
    page.wait_for_selector("#start:not([disabled])")
    page.click("#start")
    page.wait_for_selector("#cancel:not([disabled])")
    page.click("#cancel")
    page.wait_for_selector("#status .panel.warning")


def test_bad_files_are_explained_and_shown_as_text(page, tmp_path):
    evil = "<img src='https://elsewhere.example/x.png' onerror='document.title=1'><script>alert(1)</script>"
    rows = [{"prompt": f"{evil} ![x](https://elsewhere.example/y.png)", "completion": evil}] * 3
    lines = [*map(json.dumps, rows), "{broken", json.dumps({"prompt": evil, "completion": ""}), json.dumps(rows[0])]
    mixed, empty, odd = (tmp_path / name for name in ("mixed.jsonl", "empty.csv", "odd.parquet"))
    mixed.write_text("\n".join(lines))
    empty.write_text("")
    odd.write_bytes(b"no parquet")
    for path, told in ((empty, "empty"), (odd, "no Parquet")):
        upload(page, path, f"#found .panel.error:has-text('{told}')")
    upload(page, mixed, "#found tbody tr")
    table = page.locator("#found tbody").inner_text()
    assert "4" in table and "5" in table
    assert page.locator("#found img, #found script").count() == 0
    assert page.title() == "safe_trainer"
    page.click("#to-method")
    page.click("#check")
    page.wait_for_selector("#method-problem .panel.error")
    assert serious_findings(page) == []


def test_the_keyboard_suffices(page):
    def walk_to(selector):
        for _ in range(40):
            if page.evaluate("s => !!document.activeElement.closest(s)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached")

    walk_to("#example-attack")
    page.keyboard.press("Enter")
    page.wait_for_selector("#to-method:not([disabled])")
    walk_to("#found .blurred input")
    page.keyboard.press("Space")
    assert page.locator("#found .blurred input").is_checked()
    walk_to("#to-method")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card-asft input")
    walk_to("#card-asft")
    page.keyboard.press("Space")
    assert page.locator("#card-asft input").is_checked()
    walk_to("#check")
    page.keyboard.press("Enter")
    page.wait_for_selector("#start:not([disabled])")
    walk_to("#start")
