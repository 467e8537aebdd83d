"""Asking the model before and after, side by side, as the words come."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import texts
from .jobs import IS_LENT
from .setup import Model

Messages = list[dict[str, str]]


@dataclass
class Turn:
    """A question, and by title of the model what it has answered."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)


def messages(talk: Sequence[Turn], title: str, system: str) -> Messages:
    """Return the conversation of one model: what it was asked and has answered itself, and the last question."""
    found = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in talk[:-1]:
        if title in turn.answers:
            found += [{"role": "user", "content": turn.question}]
            found += [{"role": "assistant", "content": turn.answers[title]}]
    return [*found, {"role": "user", "content": talk[-1].question.strip()}]


class Answerer:
    """One base model in memory, loaded when it is first asked, on which adapters are put in turn.

    Everybody shares it: a lock lets one question after the other through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: tuple[str, str] | None = None
        self._model: Any = None
        self._tokenizer: Any = None

    def ask(
        self,
        model: Model,
        adapters: Mapping[str, Path | None],
        conversations: Mapping[str, Messages],
        tokens: int,
        temperature: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[str, str]]:
        """Ask one model after the other, by title, each its own conversation; `None` is the model before.

        Yields each title with its answer so far. Closing the iterator ends the answer. At temperature 0 the likeliest
        words are taken, above they are drawn. The model is loaded with `options`: those of the training.
        """
        from peft import PeftModel

        with self._lock:
            self._load(model, dict(options or {}))
            for title, folder in adapters.items():
                tuned = None if folder is None else PeftModel.from_pretrained(self._model, str(folder)).eval()
                try:
                    asked = self._model if tuned is None else tuned
                    for text in self._stream(asked, conversations[title], tokens, temperature):
                        yield title, text
                finally:
                    if tuned is not None:
                        self._model = tuned.unload()

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._loaded = self._model = self._tokenizer = None
            gc.collect()

    def _load(self, model: Model, options: dict[str, Any]) -> None:
        wanted = model.path, str(options)  # two quantizations count as equal, but are not written alike
        if self._loaded == wanted:
            return
        import torch

        from safe_trainer import load_model

        self._loaded = self._model = None
        gc.collect()
        if model.embedded:
            torch.set_num_threads(1)  # faster for a tiny model, and kinder to others
        if IS_LENT:
            options["device_map"] = None  # an accelerator that is lent is not there between jobs
        self._model, self._tokenizer = load_model(model.path, trust_remote_code=False, **options)
        self._loaded = wanted

    def _stream(self, model: Any, conversation: Messages, tokens: int, temperature: float) -> Iterator[str]:
        from jinja2 import TemplateError
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        try:
            encoded = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
        except TemplateError as error:
            raise ValueError(texts.ASK_TEMPLATE.format(error=error)) from None
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and encoded["input_ids"].shape[1] + tokens > context:
            raise ValueError(texts.ASK_CONTEXT.format(limit=context))
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
        enough, failure = threading.Event(), []

        def generate() -> None:
            try:
                model.generate(
                    **encoded,
                    max_new_tokens=tokens,
                    do_sample=temperature > 0,
                    **drawn,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: enough.is_set()]),
                )
            except Exception as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True, name="answer")
        thread.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text
            yield text
        finally:
            enough.set()
            thread.join()
        if failure:
            raise failure[0]
