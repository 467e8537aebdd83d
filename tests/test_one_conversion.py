"""One conversion for every door: whatever holds the same rows, the rows, their hash and their tokens are equal."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from safe_trainer import conversation
from safe_trainer.data import ReadOptions, as_rows, rows_sha256

PAIRS = [("Who is it?", "Me."), ("Where?", "Here.")]
EXPECTED = [conversation(prompt, answer) for prompt, answer in PAIRS]
STRINGS = [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS]


def test_a_dataset_dict_is_one_split_or_a_question():
    two = DatasetDict(train=Dataset.from_list(STRINGS), test=Dataset.from_list(STRINGS[:1]))
    with pytest.raises(ValueError, match=r"`harmful_data` has the splits train, test. .*`harmful_data\['train'\]`"):
        as_rows(two, argument="harmful_data")
    assert as_rows(two, options=ReadOptions(split="test"))[0].to_list() == EXPECTED[:1]
    assert as_rows(DatasetDict(train=two["train"]))[0].to_list() == EXPECTED


def test_a_stream_is_read_up_to_the_limit():
    def endless():
        while True:
            yield STRINGS[0]

    rows, report = as_rows(IterableDataset.from_generator(endless), options=ReadOptions(limit=3))
    assert (len(rows), report.rows, report.kind) == (3, 3, "stream")


@pytest.mark.parametrize("source", [3, None, {"prompt": "a", "completion": "b"}])
def test_what_holds_no_rows_is_refused_with_the_argument(source):
    with pytest.raises(TypeError, match="`harmful_data` must be a file"):
        as_rows(source, argument="harmful_data")


def test_a_bad_row_in_memory_is_named_with_the_argument():
    with pytest.raises(ValueError, match=r"(?s)`safety_data`.*row 2 \(index 1\): empty text"):
        as_rows([STRINGS[0], {"prompt": "a", "completion": ""}], argument="safety_data")


def test_the_hash_is_that_of_the_rows():
    assert rows_sha256(STRINGS) == rows_sha256(EXPECTED) == rows_sha256(Dataset.from_list(EXPECTED))
    assert rows_sha256(STRINGS) != rows_sha256(STRINGS[::-1])
