"""Data on its way in: any file, dataset or list becomes rows to learn from, or prompts to examine a model with.

`loaders` gets records out of files and datasets (`parsing` out of their text); `formats` knows what columns mean;
`reading` has the options and the report; `rows` is the one conversion to training rows, `prompts` that to prompt
sets, `suites` has published ones; `encoding` turns rows into tokens.
"""

from .encoding import Batch, EncodedRow, TemplateError, collate, encode_row, encode_rows
from .formats import BadRowError, Columns, Format, Row, conversation_of
from .loaders import KINDS, PREFIX, HubDataset, encoding_of, hub_dataset, is_file, kind_of, read_records
from .parsing import Record, RowError
from .prompts import Kind, PromptSet, as_prompts, general_prompts, leaked_rows, load_prompts
from .reading import DataReport, ReadOptions, converted_records, named, open_source
from .rows import as_rows, conversation, labels_of, load_rows, poison, rows_sha256, split_by_label
from .suites import Suite, load_suite, suites

__all__ = [
    "KINDS",
    "PREFIX",
    "BadRowError",
    "Batch",
    "Columns",
    "DataReport",
    "EncodedRow",
    "Format",
    "HubDataset",
    "Kind",
    "PromptSet",
    "ReadOptions",
    "Record",
    "Row",
    "RowError",
    "Suite",
    "TemplateError",
    "as_prompts",
    "as_rows",
    "collate",
    "conversation",
    "conversation_of",
    "converted_records",
    "encode_row",
    "encode_rows",
    "encoding_of",
    "general_prompts",
    "hub_dataset",
    "is_file",
    "kind_of",
    "labels_of",
    "leaked_rows",
    "load_prompts",
    "load_rows",
    "load_suite",
    "named",
    "open_source",
    "poison",
    "read_records",
    "rows_sha256",
    "split_by_label",
    "suites",
]
