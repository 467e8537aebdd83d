"""Data on its way in: files of every common format become rows to learn from and prompts to be examined with.

`rows` says what a row and a prompt set are; `files`, `parsing` and `hub` get records out of files and datasets;
`formats` knows what their columns mean; `reading` turns the one into the other and reports on what could not be used;
`loading` is what users call; `overlap` finds what is the same.
"""

from .encoding import EncodedRow, encode_row
from .files import read_records
from .hub import HubDataset
from .loading import as_prompts, as_rows, load_prompts, load_rows, rows_sha256, stream_rows
from .overlap import leaked_rows
from .reading import DataReport, ReadOptions
from .rows import Kind, PromptSet, Row, conversation, poison

__all__ = [
    "EncodedRow",
    "HubDataset",
    "Kind",
    "PromptSet",
    "ReadOptions",
    "DataReport",
    "Row",
    "as_prompts",
    "as_rows",
    "conversation",
    "encode_row",
    "leaked_rows",
    "load_prompts",
    "load_rows",
    "poison",
    "read_records",
    "rows_sha256",
    "stream_rows",
]
