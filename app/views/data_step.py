"""Step 1: example or file, model, and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import texts
from ..inspection import ENDINGS, MEASURED, Inspection, Sample
from ..jobs import Job
from ..sessions import Session
from ..setup import EMBEDDED, EXAMPLES, Setup
from . import html

OTHER = "other"
ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "cp1251", "shift_jis", "gb18030", "euc_kr")


class DataStep:
    """The step's layout, and its updates."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        gr.Markdown(f"## {texts.DATA_HEADING}\n{texts.DATA_LEAD}")
        with gr.Row(elem_classes="examples"):
            self.examples = {
                key: gr.Button(": ".join(texts.EXAMPLES[key]), elem_id=f"example-{key}") for key in EXAMPLES
            }
        self.upload = gr.File(label=self._label(None), file_types=list(ENDINGS), elem_id="upload", height=130)
        with gr.Accordion(texts.HUB, open=False, visible=setup.hub, elem_id="hub"):
            with gr.Row():
                name, narrow = {"max_length": 200, "min_width": 180}, {"precision": 0, "minimum": 1, "min_width": 120}
                self.hub_name = gr.Textbox("", label=texts.HUB_ID, placeholder=texts.MODEL_ID_HINT, **name)
                self.hub_subset = gr.Textbox("", label=texts.HUB_SUBSET, **name)
                self.hub_split = gr.Textbox("train", label=texts.HUB_SPLIT, **name)
                self.hub_first = gr.Number(1, label=texts.HUB_FIRST, **narrow)
                self.hub_count = gr.Number(1000, label=texts.HUB_COUNT, **narrow)
            self.use_hub = gr.Button(texts.HUB_USE, elem_id="use-hub")
        choices = [(texts.EMBEDDED if key == EMBEDDED.key else key, key) for key in setup.models]
        choices += [(texts.OTHER_MODEL, OTHER)] if setup.any_model else []
        self.model = gr.Dropdown(
            choices, value=EMBEDDED.key, label=texts.MODEL, info=texts.MODEL_INFO, elem_id="model", filterable=False
        )
        with gr.Group(visible=False) as self.other:
            self.other_id = gr.Textbox("", label=texts.MODEL_ID, placeholder=texts.MODEL_ID_HINT, max_length=200)
            self.unaligned_id = gr.Textbox(
                "", label=texts.UNALIGNED_ID, placeholder=texts.MODEL_ID_HINT, max_length=200
            )
            self.use_other = gr.Button(texts.USE_MODEL)
        self.found = gr.HTML(html.panel("info", texts.NO_DATA), elem_id="found", js_on_load=None)
        self.skip_bad = gr.Checkbox(label=texts.SKIP_BAD, visible=False, elem_id="skip-bad")
        with gr.Accordion(texts.OPTIONS, open=False, visible=False, elem_id="file-options") as self.options:
            gr.Markdown(texts.OPTIONS_HINT)
            with gr.Row():
                self.columns = {role: _choice(label, f"{role}-column") for role, label in texts.COLUMNS.items()}
                self.encoding = _choice(texts.ENCODING, "encoding", ENCODINGS)
            self.preview = gr.HTML(elem_id="preview", js_on_load=None)
            self.again = gr.Button(texts.READ_AGAIN, elem_id="read-again")
        with gr.Row(elem_classes="actions"):
            self.proceed = gr.Button(texts.TO_METHOD, variant="primary", interactive=False, elem_id="to-method")
            self.scan = gr.Button(texts.SCAN, interactive=False, elem_id="scan")
            self.stop = gr.Button(texts.SCAN_STOP, visible=False, elem_id="scan-stop")
        gr.Markdown(texts.SCAN_HINT)
        self.leave_out = gr.Button(visible=False, elem_id="leave-out")
        self.ranking = gr.HTML(elem_id="ranking", js_on_load=None)
        self.samples = gr.HTML(elem_id="samples", js_on_load=None)

    def show(self, session: Session, limit: int, problem: str = "") -> dict[Any, Any]:
        """Return updates."""
        found = session.inspection
        usable = found is not None and found.rows > 0
        parts = [html.panel("error", problem)] if problem else []
        parts += [described(found, limit)] if found and usable else []
        chosen = dict(found.reading) if found else {}
        columns = chosen.get("columns") or {}
        model = session.model
        names = [(texts.DETECT, ""), *((name, name) for name in (found.columns if found else ()))]
        return {
            self.found: html.join(parts or [html.panel("info", texts.NO_DATA)]),
            self.samples: samples(found.samples, hidden=_is_harmful(found)) if found and usable else "",
            self.upload: gr.File(label=self._label(found)),
            self.skip_bad: gr.Checkbox(
                visible=bool(found and found.bad and usable), value=bool(session.form.get("skip_bad"))
            ),
            self.options: gr.Accordion(visible=bool(found and not found.example), open=bool(found and not usable)),
            self.preview: "",
            **{box: gr.Dropdown(choices=names, value=columns.get(role, "")) for role, box in self.columns.items()},
            self.encoding: gr.Dropdown(value=chosen.get("encoding", "")),
            self.proceed: gr.Button(interactive=usable),
            self.model: gr.Dropdown(value=model.key if model.key in self.setup.models else OTHER),
            self.other: gr.Group(visible=model.key not in self.setup.models),
            **self.show_scan(session),
        }

    def emptied(self, session: Session) -> dict[Any, Any]:
        """Return an update that empties the box for files; a page that has just been opened may be filling it."""
        return {self.upload: gr.File(value=None, label=self._label(session.inspection))}

    def reading(self) -> dict[Any, Any]:
        """Return updates while a file is read."""
        return {
            self.found: html.working(texts.READING, 0, 0),
            self.samples: "",
            self.proceed: _off(),
            self.scan: _off(),
        }

    def show_scan(self, session: Session) -> dict[Any, Any]:
        """Return updates that show what the newest scan of the rows in use found, or how far a scan is."""
        newest, found = session.job("scan"), session.inspection
        active = newest is not None and not newest.ended
        job = newest if active else session.scan
        ranking = job.ranking() if job is not None and job.ended else None
        above = ranking["above"] if ranking else 0
        return {
            self.ranking: _ranked(job),
            self.scan: gr.Button(interactive=bool(found and found.rows) and not session.busy),
            self.stop: gr.Button(visible=active),
            self.leave_out: gr.Button(texts.LEAVE_OUT.format(count=above), visible=above > 0),
        }

    def _label(self, found: Inspection | None) -> str:
        if found is None or found.example is not None:
            return texts.UPLOAD.format(size=self.setup.limits.megabytes)
        return (texts.UPLOADED if found.rows else texts.NOT_USED).format(name=found.name)


def described(found: Inspection, limit: int) -> Markup:
    """Say what is in a file."""
    tokens = texts.TOKENS_VALUE.format(median=found.median, most=max(found.lengths, default=0))
    if found.rows > MEASURED:
        tokens += texts.TOKENS_SAMPLED.format(count=len(found.lengths))
    pairs = [
        (texts.FILE, texts.EXAMPLES[found.example.key][0] if found.example else found.name),
        (texts.FORMAT, found.format),
        (texts.ROWS, f"{found.rows:,}"),
        (texts.TOKENS, tokens),
        (texts.DUPLICATES, f"{found.duplicates:,}"),
        (texts.BAD, f"{found.bad:,}"),
    ]
    parts = [html.facts(pairs)]
    cut = sum(length > limit for length in found.lengths) / max(1, len(found.lengths))
    if cut:
        parts.append(html.panel("warning", texts.CUT.format(share=cut, limit=limit)))
    parts += [
        html.panel("warning", texts.LEAKED.format(count=count, name=name)) for name, count in found.leaked.items()
    ]
    parts += [html.panel("warning", f"{note}.") for note in found.notes]
    if found.bad:
        parts.append(html.table(texts.BAD_HEADING, texts.BAD_COLUMNS, found.troubles))
        parts.append(html.panel("warning", texts.BAD_FIRST))
    return html.join(parts)


def samples(rows: Iterable[Sample], *, hidden: bool = False) -> Markup:
    """Show rows as the model will see them, as text or, on request, token by token."""
    pieces = html.join(
        Markup('<pre class="text">{}<mark>{}</mark></pre><pre class="tokens">{}<mark>{}</mark></pre>').format(
            row.read, row.learned, _tokens(row.read_tokens), _tokens(row.learned_tokens)
        )
        for row in rows
    )
    return Markup(
        '<section class="samples"><h3>{}</h3><p>{}</p><label><input type="checkbox" class="as-tokens"> {}</label>{}'
        "</section>"
    ).format(
        texts.SAMPLE_HEADING,
        texts.SAMPLE_HINT,
        texts.SAMPLE_TOKENS,
        html.hidden(texts.REVEAL, pieces) if hidden else pieces,
    )


def _tokens(tokens: Sequence[str]) -> Markup:
    return html.join(Markup("<i>{}</i>").format(token) for token in tokens)


def _is_harmful(found: Inspection) -> bool:
    return found.example is not None and found.example.harmful == 1


def _ranked(job: Job | None) -> Markup:
    if job is None:
        return Markup("")
    progress = job.progress
    if not job.ended:
        return html.working(texts.PHASES[progress.phase], progress.done, progress.total)
    found = job.ranking()
    if found is None:
        kind = "warning" if progress.state == "cancelled" else "error"
        return html.panel(kind, f"{texts.STATES[progress.state]}. {progress.message}")
    summary = texts.SCAN_FOUND.format(above=found["above"], scored=found["scored"], threshold=found["threshold"])
    rows = [
        [str(row["line"]), f"{row['share']:.0%}", html.short(row["prompt"]), html.short(row["answer"])]
        for row in found["top"]
    ]
    table = html.table(texts.SCAN_HEADING, texts.SCAN_COLUMNS, rows)
    link = Markup("<p>{}</p>").format(html.download(job.id, "all", "ranking"))
    return html.panel("warning" if found["above"] else "good", summary) + link + html.hidden(texts.REVEAL, table)


def _choice(label: str, name: str, values: tuple[str, ...] = ()) -> gr.Dropdown:
    choices = [(texts.DETECT, ""), *((value, value) for value in values)]
    return gr.Dropdown(choices, value="", label=label, elem_id=name, filterable=False)


def _off() -> gr.Button:
    return gr.Button(interactive=False)
