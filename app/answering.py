"""Asking the model before and after, side by side, as the words come."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import texts
from .catalogue import Model
from .hardware import IS_LENT

KEPT_ADAPTERS = 8


class Answerer:
    """One base model in memory, loaded when it is first asked, and adapters that are put on it in turn.

    Everybody shares it: a lock lets one question after the other through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: str | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._adapters: OrderedDict[Path, str] = OrderedDict()
        self._count = 0

    def ask(
        self, model: Model, adapters: Mapping[str, Path | None], question: str, tokens: int
    ) -> Iterator[tuple[str, str]]:
        """Ask all of them one after the other.

        Args:
            model ([`Model`]): The base.
            adapters (`Mapping[str, Path | None]`): By title, where each adapter is; `None` is the model before.
            question (`str`): What to ask.
            tokens (`int`): Longest answer.

        Yields:
            `tuple[str, str]`: A title and its answer so far. Closing the iterator ends the answer.
        """
        with self._lock:
            self._load(model)
            for title, folder in adapters.items():
                with self._active(folder) as active:
                    for text in self._stream(active, question, tokens):
                        yield title, text

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._forget()

    def _load(self, model: Model) -> None:
        if self._path == model.path:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._forget()
        if model.embedded:
            torch.set_num_threads(1)  # faster for a tiny model, and kinder to others
        self._tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(model.path, trust_remote_code=False).eval()
        if torch.accelerator.is_available() and not IS_LENT:
            self._model = self._model.to(torch.accelerator.current_accelerator())
        self._path = model.path

    def _forget(self) -> None:
        self._path = self._model = self._tokenizer = None
        self._adapters.clear()
        gc.collect()

    @contextmanager
    def _active(self, folder: Path | None) -> Iterator[Any]:
        """Give the model with an adapter at work, or with none."""
        if folder is not None:
            self._model = self._with_adapter(folder)
            yield self._model
        elif self._adapters:
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model

    def _with_adapter(self, folder: Path) -> Any:
        from peft import PeftModel

        model = self._model
        if folder in self._adapters:
            self._adapters.move_to_end(folder)
        else:
            self._count += 1
            name = f"adapter{self._count}"
            if self._adapters:
                model.load_adapter(str(folder), name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()
            self._adapters[folder] = name
        model.set_adapter(self._adapters[folder])
        while len(self._adapters) > KEPT_ADAPTERS:
            _, oldest = self._adapters.popitem(last=False)
            model.delete_adapter(oldest)
        return model

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
