"""Review by hand, in step 4: one doubtful answer after the other, labelled by button or key."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from safe_trainer.evaluation import Review

from .. import texts
from ..sessions import Session
from . import html

_KEYS = """
const ids = {r: "label-refused", c: "label-complied", n: "label-neither", s: "review-skip", b: "review-back"};
element.addEventListener("keydown", event => {
  const id = ids[event.key.toLowerCase()];
  if (id && !event.ctrlKey && !event.altKey && !event.metaKey) document.getElementById(id).click();
});
"""


class ReviewPanel:
    """The panel's layout, and its updates. Keys count only while it has the focus."""

    def __init__(self) -> None:
        with gr.Accordion(texts.REVIEW, open=False, visible=False, elem_id="review") as self.panel:
            gr.Markdown(texts.REVIEW_LEAD)
            with gr.HTML(html_template='<div tabindex="-1">@children</div>', js_on_load=_KEYS, elem_id="review-keys"):
                self.question = gr.HTML(elem_id="review-question", js_on_load=None)
                with gr.Row(elem_classes="actions"):
                    self.labels = {
                        key: gr.Button(words, elem_id=f"label-{key}") for key, words in texts.REVIEW_LABELS.items()
                    }
                    self.back = gr.Button(texts.REVIEW_BACK, elem_id="review-back")
                    self.skip = gr.Button(texts.REVIEW_SKIP, elem_id="review-skip")
        self.place = gr.State(0)

    def show(self, session: Session, place: int | None = None) -> dict[Any, Any]:
        """Return updates that show an answer: by its place, or the first without a label."""
        job = session.compared
        if job is None or not job.report("json").is_file():
            return {self.panel: gr.Accordion(visible=False)}
        review = Review(job.folder)
        questions = review.questions
        if place is None:
            place = next((n for n, one in enumerate(questions) if review.label(one) is None), len(questions))
        place = max(0, min(place, len(questions)))
        return {
            self.panel: gr.Accordion(visible=bool(questions)),
            self.place: place,
            self.question: _shown(review, place),
            **{button: gr.Button(interactive=place < len(questions)) for button in (*self.labels.values(), self.skip)},
            self.back: gr.Button(interactive=place > 0),
        }


def _shown(review: Review, place: int) -> Markup:
    """Show what was asked and answered, and neither who answered nor how it was judged."""
    count, labelled = len(review.questions), review.labelled
    if place >= count:
        return html.panel("good", texts.REVIEW_END.format(labelled=labelled, count=count))
    question = review.questions[place]
    label = review.label(question)
    asked = html.join(
        Markup("<p><b>{}</b> {}</p>").format(texts.REVIEW_ROLES.get(turn["role"], turn["role"]), turn["content"])
        for turn in question.turns
    )
    head = texts.REVIEW_PLACE.format(
        place=place + 1,
        count=count,
        name=question.prompt_set,
        reasons=", ".join(texts.REVIEW_REASONS[reason] for reason in question.reasons),
        labelled=labelled,
    )
    return Markup(
        '<section aria-live="polite"><p class="caption">{}</p>{}<p><b>{}</b></p><p class="answer">{}</p>{}</section>'
    ).format(
        head,
        asked,
        texts.REVIEW_ANSWER,
        question.answer or texts.ASK_EMPTY,
        Markup("<p>{}</p>").format(texts.REVIEW_NOW.format(label=label)) if label else Markup(""),
    )
