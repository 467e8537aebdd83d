"""Asking the model before and after, side by side, as the words come."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import texts
from .jobs import IS_LENT
from .setup import Model


class Answerer:
    """One base model in memory, loaded when it is first asked, on which adapters are put in turn.

    Everybody shares it: a lock lets one question after the other through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: str | None = None
        self._model: Any = None
        self._tokenizer: Any = None

    def ask(
        self, model: Model, adapters: Mapping[str, Path | None], question: str, tokens: int
    ) -> Iterator[tuple[str, str]]:
        """Ask one model after the other, by title; `None` is the model before.

        Yields each title with its answer so far. Closing the iterator ends the answer.
        """
        from peft import PeftModel

        with self._lock:
            self._load(model)
            for title, folder in adapters.items():
                tuned = None if folder is None else PeftModel.from_pretrained(self._model, str(folder)).eval()
                try:
                    for text in self._stream(self._model if tuned is None else tuned, question, tokens):
                        yield title, text
                finally:
                    if tuned is not None:
                        self._model = tuned.unload()

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._path = self._model = self._tokenizer = None
            gc.collect()

    def _load(self, model: Model) -> None:
        if self._path == model.path:
            return
        import torch

        from safe_trainer import load_model

        self._path = self._model = None
        gc.collect()
        if model.embedded:
            torch.set_num_threads(1)  # faster for a tiny model, and kinder to others
        elsewhere = {"device_map": None} if IS_LENT else {}  # an accelerator that is lent is not there between jobs
        self._model, self._tokenizer = load_model(model.path, trust_remote_code=False, **elsewhere)
        self._path = model.path

    def _stream(self, model: Any, question: str, tokens: int) -> Iterator[str]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        encoded = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
        enough, failure = threading.Event(), []

        def generate() -> None:
            try:
                model.generate(
                    **encoded,
                    max_new_tokens=tokens,
                    do_sample=False,
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
            yield text or texts.ASK_EMPTY
        finally:
            enough.set()
            thread.join()
        if failure:
            raise failure[0]
