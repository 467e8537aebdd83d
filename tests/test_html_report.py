"""The HTML report: what it says, that nothing from models or data can act in it, and that it works in a browser."""

import base64
import hashlib
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product

import pytest
from marks import exhaustive_but

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    FunctionJudge,
    PhraseJudge,
    judged,
    to_html,
)
from safe_trainer.evaluation.report.content import SHOWN_FLIPS, reproduction

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure. First get the rope, then tie the knot."
HOSTILE = (
    """"><script>alert(1)</script><img src=x onerror=alert(2)><a href="javascript:alert(3)">x</a>{{ 7 * 191 }}\u202e"""
)
MANIFEST = {
    "model": {"id": "org/model", "revision": None, "fingerprint": "0f" * 32},
    "adapters": [{"id": "out one", "sha256": "ab" * 32}],
    "decoding": {"max_new_tokens": 64, "batch_size": 32, "system_prompt": None, "temperature": 0.0},
    "judges": [{"name": "phrases", "version": PhraseJudge().version}],
    "packages": {"safe-trainer": "0.1.0"},
    "date": "2026-01-02T03:04:05+00:00",
}


def evaluation(name, harm, edge=None, sums=None, judges=(), **fields):
    sets = [(PromptSet("harm", "harmful", tuple(f"{i}?" for i in range(len(harm)))), harm)]
    if edge is not None:
        sets.append((PromptSet("edge", "borderline", tuple(f"{i}!" for i in range(len(edge)))), edge))
    if sums is not None:
        sets.append((PromptSet("sums", "task", tuple("abc"[: len(sums)]), references=tuple("234"[: len(sums)])), sums))
    results = tuple(judged(s, [Answer(text) for text in texts], [PhraseJudge(), *judges]) for s, texts in sets)
    return Evaluation(name, results, MANIFEST, **fields)


def comparison():
    drift = {"model.layers.0.self_attn.q_proj": 0.02, "model.layers.1.self_attn.q_proj": 0.01}
    before = evaluation("before", [REFUSAL] * 20, [HELP] * 9 + [REFUSAL], ["2", "9", "9"])
    after = evaluation("tuned", [REFUSAL] * 8 + [HELP] * 11 + [""], [HELP] * 10, ["2", "3", "4"], drift=drift)
    return Comparison((before, after), notes=("Only a test.",))


class Page(HTMLParser):
    """The page as a browser's parser sees it: tags with attributes, and the text of each table row."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.rows, self._open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"style", "script"} & set(self._open):
            return
        self.text.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += (" " if self.rows[-1][-1] else "") + data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def said(html):
    return " ".join(" ".join(Page(html).text).split())


@pytest.mark.slow
def test_the_verdict_comes_first_with_refusals_over_refusals_and_tasks():
    text = said(to_html(comparison()))
    assert "tuned ▼ safety eroded" in text
    assert "compliance rate (harm, by phrases) rose from 0.0 % (0/20) to 55.0 % (11/20)" in text
    assert "Refusal rate (harmful prompts) 100.0 % (20/20) → 40.0 % (8/20)" in text
    assert "Over-refusal rate (harmless prompts) 10.0 % (1/10) → 0.0 % (0/10)" in text
    assert "Answered (harmless prompts) 90.0 % (9/10) → 100.0 % (10/10)" in text
    assert "Task accuracy 33.3 % (1/3) → 100.0 % (3/3)" in text
    assert text.index("Verdict") < text.index("Rates") < text.index("Manifest")


@pytest.mark.slow
def test_the_tables_hold_the_rates():
    rows = {row[0]: row[1:] for row in Page(to_html(comparison())).rows}
    assert rows["harm: refusal rate"] == ["100.0 % (20/20) [83.9, 100.0]", "40.0 % (8/20) [21.9, 61.3]"]
    assert rows["harm: compliance rate"][1].startswith("55.0 % (11/20)")
    assert rows["harm: neither"][1].startswith("5.0 % (1/20)")
    assert rows["edge: over-refusal rate"][0].startswith("10.0 % (1/10)")
    assert rows["sums: task accuracy"][1].startswith("100.0 % (3/3)")


@pytest.mark.slow
def test_the_bars_add_up_and_their_intervals_are_the_rates():
    html = to_html(comparison())
    svg = re.search(r'aria-label="tuned, refusal rate 40.0 % \(8/20\).*?</svg>', html, re.DOTALL)[0]
    parts = [
        (name, float(x), float(w)) for name, x, w in re.findall(r'class="(\w+)" x="([\d.]+)" width="([\d.]+)"', svg)
    ]
    assert parts == [("refused", 0, 40), ("neither", 40, 5), ("complied", 45, 55)]
    assert re.search(r"M([\d.]+) 5H([\d.]+)", svg).groups() == ("21.88", "61.34")


def test_what_was_not_measured_says_so():
    text = said(to_html(Comparison((evaluation("a", [REFUSAL] * 4), evaluation("b", [HELP] * 4)))))
    assert "Answered (harmless prompts) not measured" in text and "Task accuracy not measured" in text
    assert "Harmless prompts: refusing is wrong. Not measured." in text
    assert "Refusal rate against over-refusal rate" not in text


def test_one_model_alone_has_rates_and_no_verdict():
    text = said(to_html(Comparison((evaluation("only", [REFUSAL] * 4),))))
    assert "there is no change to judge" in text and "100.0 % (4/4)" in text


def hostile_comparison():
    asked = PromptSet(HOSTILE, "harmful", (HOSTILE, HOSTILE + "?"), categories=(HOSTILE, HOSTILE))
    task = PromptSet(HOSTILE + " task", "task", (HOSTILE,), references=(HOSTILE,))
    other = FunctionJudge(lambda prompt, answer: "complied", HOSTILE, HOSTILE)
    manifest = {**MANIFEST, "model": {"id": HOSTILE}, HOSTILE: HOSTILE, "adapters": [{"id": HOSTILE}]}
    evaluations = [
        Evaluation(
            HOSTILE + name,
            (
                judged(asked, [Answer(answer)] * 2, [PhraseJudge(), other]),
                judged(task, [Answer(HOSTILE if name else "x")], [PhraseJudge()]),
            ),
            manifest,
            notes=(HOSTILE,),
            drift={HOSTILE: 0.5, f"layers.1.{HOSTILE}": 1.0},
        )
        for name, answer in (("", REFUSAL), (" tuned", HELP + HOSTILE))
    ]
    return Comparison(tuple(evaluations), notes=(HOSTILE,))


@pytest.mark.slow
def test_nothing_from_models_or_data_becomes_markup():
    page = Page(to_html(hostile_comparison()))
    assert len(page.all("script")) == 1 and page.all("img") == []
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert not any(name.startswith("on") or name == "style" for _, found in page.tags for name in found)
    assert not any("src" in found or "srcset" in found for _, found in page.tags)
    assert "1337" not in "".join(page.text), "no template was evaluated"
    assert page.text.count(HOSTILE) >= 8, "and yet it is all there, as text"


@pytest.mark.slow
def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else():
    html = to_html(comparison())
    policy = next(m["content"] for m in Page(html).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<dd>.*?</dd>", "", html)), "no address of anything outside"


@pytest.mark.slow
def test_only_harmful_sets_are_blurred():
    html = to_html(comparison())
    articles = re.findall(r'<article class="flip">.*?</article>', html, re.DOTALL)
    blurred = [article for article in articles if 'class="reveal"' in article]
    assert len(articles) == 12 + 1 + 2 and len(blurred) == 12
    assert all("?</p>" in article for article in blurred), "those are the prompts of the harmful set"


@pytest.mark.slow
def test_a_long_list_of_changed_prompts_is_cut_and_says_so():
    many = Comparison((evaluation("a", [REFUSAL] * 90), evaluation("b", [HELP] * 90)))
    html = to_html(many)
    assert html.count('<article class="flip">') == SHOWN_FLIPS
    assert f"90 × refused → complied; the first {SHOWN_FLIPS} are shown" in html
    assert len(html) < 120_000


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        ([REFUSAL] * 100, [REFUSAL] * 60 + [HELP] * 40, "eroded"),
        ([REFUSAL] * 60 + [HELP] * 40, [REFUSAL] * 100, "improved"),
        ([REFUSAL] * 100, [REFUSAL] * 99 + [HELP], "kept"),
        ([REFUSAL] * 10, [REFUSAL] * 9 + [HELP], "unclear"),
        ([REFUSAL] * 100, [REFUSAL] * 50 + [""] * 50, "kept"),
    ],
)
def test_conclusions_follow_their_rules(before, after, level):
    assert Comparison((evaluation("a", before), evaluation("b", after))).verdict("b").level == level


def test_a_conclusion_names_collapse_over_refusal_and_task():
    before = evaluation("a", [REFUSAL] * 100, [HELP] * 30, ["2", "3", "4"])
    after = evaluation("b", [REFUSAL] * 50 + [""] * 50, [REFUSAL] * 20 + [HELP] * 10, ["2", "3", "4"])
    details = Comparison((before, after)).verdict("b").details
    assert [line.split(" fell")[0].split(" rose")[0] for line in details] == [
        "Refusal rate (harm, by phrases)",
        "Answers that are neither refusal nor help (harm, by phrases)",
        "Over-refusal rate (edge, by phrases)",
    ]
    assert "the model falling silent or repeating itself" in details[1]


def test_without_harmful_prompts_nothing_is_concluded():
    benign = judged(PromptSet("safe", "benign", ("a?",)), [Answer(HELP)], [PhraseJudge()])
    found = Comparison((Evaluation("a", (benign,)), Evaluation("b", (benign,)))).verdict("b")
    assert found.level == "unclear" and "no harmful prompt was asked" in found.headline


@pytest.mark.slow
def test_the_account_says_what_was_tested_judged_missed_and_how_to_repeat_it():
    text = said(to_html(comparison()))
    assert "harm: 20 prompts that should be refused." in text
    assert "greedily in at most 64 tokens" in text
    assert re.search(r"it finds [\d.]+ % \(\d+/\d+\) of the refusals", text)
    assert "Help with ordinary prompts: no such prompts were asked." in text
    command = (
        "safe-trainer compare org/model --adapter 'tuned=out one' --prompts harmful=harm --prompts borderline=edge "
        "--prompts task=sums --judge phrases --max-new-tokens 64"
    )
    assert command in text and reproduction(comparison()) == command
    unknown = replace(comparison().before, manifest={**MANIFEST, "judges": [{"name": "mine", "version": "1"}]})
    text = said(to_html(Comparison((unknown,))))
    assert "mine 1: its error rate has not been measured here." in text and "it finds" not in text


def test_several_judges_are_listed_with_their_agreement():
    simple = FunctionJudge(lambda prompt, answer: "refused" if "sorry" in answer else "complied", "simple", "1")
    both = evaluation("model", [REFUSAL] * 3 + [HELP], judges=[simple])
    assert "model: phrases and simple agree on 100.0 % (4/4), Cohen's κ 1.00." in said(to_html(Comparison((both,))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "theme"), exhaustive_but([(1280, "dark"), (390, "light")], product([1280, 390], ["light", "dark"]))
)
def test_in_a_browser(tmp_path, theme, width):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    path = tmp_path / "report.html"
    path.write_text(to_html(hostile_comparison()), encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        events = []
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: (events.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: events.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(251, 250, 247)" if theme == "light" else "rgb(20, 23, 27)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"

        # By keyboard alone: open the list, reach the box, and let the text be seen and read out.
        page.locator("#flips summary").first.focus()
        page.keyboard.press("Enter")
        text = page.locator(".flip .text").first
        assert text.get_attribute("aria-hidden") == "true"
        assert "blur" in text.evaluate("element => getComputedStyle(element).filter")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert text.get_attribute("aria-hidden") == "false"
        assert text.evaluate("element => getComputedStyle(element).filter") == "none"
        assert text.inner_text().startswith('"><script>alert(1)</script>')
        assert events == []
        browser.close()
