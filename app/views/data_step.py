"""Step 1: example or file, model, and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import texts
from ..catalogue import EMBEDDED, EXAMPLES, Model
from ..inspection import ENDINGS, Inspection
from ..jobs import Job
from ..limits import Setup
from . import html

OTHER = "other"
_SHOWN_TROUBLES = 50


@dataclass
class DataStep:
    """Components of the step."""

    examples: dict[str, gr.Button]
    upload: gr.File
    model: gr.Dropdown
    other: gr.Group
    other_id: gr.Textbox
    unaligned_id: gr.Textbox
    use_other: gr.Button
    found: gr.HTML
    skip_bad: gr.Checkbox
    scan: gr.Button
    ranking: gr.HTML
    proceed: gr.Button

    @property
    def shown(self) -> list[Any]:
        """What [`show`] fills in."""
        return [self.found, self.skip_bad, self.scan, self.proceed, self.model]


def build(setup: Setup) -> DataStep:
    """Lay out the step."""
    gr.HTML(html.heading(texts.DATA_HEADING, texts.DATA_LEAD), js_on_load=None)
    with gr.Row(elem_classes="examples"):
        examples = {key: gr.Button(_example_label(key), elem_id=f"example-{key}") for key in EXAMPLES}
    label = texts.UPLOAD.format(size=setup.limits.megabytes)
    upload = gr.File(label=label, file_types=list(ENDINGS), elem_id="upload", height=130)
    choices = [(texts.EMBEDDED if key == EMBEDDED.key else key, key) for key in setup.models]
    if setup.any_model:
        choices.append((texts.OTHER_MODEL, OTHER))
    model = gr.Dropdown(
        choices, value=EMBEDDED.key, label=texts.MODEL, info=texts.MODEL_INFO, elem_id="model", filterable=False
    )
    with gr.Group(visible=False) as other:
        other_id = gr.Textbox(label=texts.MODEL_ID, placeholder=texts.MODEL_ID_HINT, max_length=200)
        unaligned_id = gr.Textbox(label=texts.UNALIGNED_ID, placeholder=texts.MODEL_ID_HINT, max_length=200)
        use_other = gr.Button(texts.USE_MODEL)
    found = gr.HTML(html.panel("info", texts.NO_DATA), elem_id="found", js_on_load=None)
    skip_bad = gr.Checkbox(label=texts.SKIP_BAD, visible=False, elem_id="skip-bad")
    gr.HTML(html.hint(texts.SCAN_HINT), js_on_load=None)
    with gr.Row():
        scan = gr.Button(texts.SCAN, interactive=False, elem_id="scan")
        proceed = gr.Button(texts.TO_METHOD, variant="primary", interactive=False, elem_id="to-method")
    ranking = gr.HTML(elem_id="ranking", js_on_load=None)
    return DataStep(
        examples, upload, model, other, other_id, unaligned_id, use_other, found, skip_bad, scan, ranking, proceed
    )


def show(setup: Setup, model: Model, inspection: Inspection | None, limit: int, problem: str = "") -> list[Any]:
    """Return updates of `DataStep.shown`.

    Args:
        setup ([`Setup`]): How the app is run.
        model ([`Model`]): The model in use.
        inspection ([`Inspection`], *optional*): The data in use.
        limit (`int`): Tokens that are kept of a row.
        problem (`str`, *optional*): What went wrong with the last wish.
    """
    parts = [html.panel("error", problem)] if problem else []
    parts += [described(inspection, limit)] if inspection else [html.panel("info", texts.NO_DATA)]
    return [
        html.join(parts),
        gr.Checkbox(visible=bool(inspection and inspection.bad), value=False),
        gr.Button(interactive=inspection is not None),
        gr.Button(interactive=inspection is not None),
        gr.Dropdown(value=model.key if model.key in setup.models else OTHER),
    ]


def described(found: Inspection, limit: int) -> Markup:
    """Say what is in a file."""
    tokens = texts.TOKENS_VALUE.format(median=found.median, most=max(found.lengths, default=0))
    pairs = [
        (texts.FILE, texts.EXAMPLES[found.example.key][0] if found.example else found.name),
        (texts.FORMAT, found.format),
        (texts.ROWS, f"{found.rows:,}"),
        (texts.TOKENS, tokens),
        (texts.DUPLICATES, f"{found.duplicates:,}"),
        (texts.BAD, f"{found.bad:,}"),
    ]
    parts = [html.facts(pairs)]
    cut = sum(length > limit for length in found.lengths)
    if cut:
        parts.append(html.panel("warning", texts.CUT.format(count=cut, limit=limit)))
    parts += [
        html.panel("warning", texts.LEAKED.format(count=count, name=name)) for name, count in found.leaked.items()
    ]
    if found.bad:
        parts.append(_troubles(found))
    parts.append(_samples(found))
    return html.join(parts)


def _troubles(found: Inspection) -> Markup:
    rows = [[str(line), *rest] for line, *rest in found.troubles[:_SHOWN_TROUBLES]]
    table = html.table(texts.BAD_HEADING, texts.BAD_COLUMNS, rows)
    more = found.bad - len(rows)
    return table + (html.panel("info", texts.BAD_MORE.format(count=more)) if more else Markup(""))


def _samples(found: Inspection) -> Markup:
    pieces = html.join(Markup("<pre>{}<mark>{}</mark></pre>").format(*sample) for sample in found.samples)
    shown = html.hidden(texts.REVEAL, pieces) if found.example and found.example.harmful == 1 else pieces
    return Markup('<section class="samples"><h3>{}</h3><p>{}</p>{}</section>').format(
        texts.SAMPLE_HEADING, texts.SAMPLE_HINT, shown
    )


def ranked(job: Job | None) -> Markup:
    """Say what a scan found, or how far it is."""
    if job is None:
        return Markup("")
    progress = job.progress
    if not job.ended:
        return html.working(texts.PHASES[progress.phase], progress.done, progress.total)
    found = job.ranking()
    if found is None:
        return html.panel("error", f"{texts.STATES[progress.state]}. {progress.message}")
    summary = texts.SCAN_FOUND.format(above=found["above"], scored=found["scored"], threshold=found["threshold"])
    rows = [
        [str(row["line"]), f"{row['share']:.0%}", html.short(row["prompt"]), html.short(row["answer"])]
        for row in found["top"]
    ]
    table = html.table(texts.SCAN_HEADING, texts.SCAN_COLUMNS, rows)
    return html.panel("warning" if found["above"] else "good", summary) + html.hidden(texts.REVEAL, table)


def _example_label(key: str) -> str:
    return ": ".join(texts.EXAMPLES[key])
