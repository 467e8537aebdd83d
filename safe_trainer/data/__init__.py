"""Data on its way in: any file, dataset or list becomes rows to learn from, or prompts to examine a model with.

`loaders` gets records out of files and datasets (`parsing` out of their text); `formats` knows what columns mean, and
`labels` what is said of an answer; `reading` has the options and the report; `rows` is the one conversion to training
rows, `prompts` that to prompt sets, `suites` has published ones; `encoding` turns rows into tokens, `thinking` tells
thoughts from answers.
"""

from .encoding import (
    OTHER_TEMPLATE,
    Batch,
    EncodedRow,
    TemplateError,
    between_turns,
    collate,
    encode_row,
    encode_rows,
    left_out,
    lost_turns,
    opening_of_answers,
)
from .formats import Columns, Format, Row, conversation_of
from .labels import safety_label, with_class_names
from .loaders import KINDS, PREFIX, HubDataset, encoding_of, hub_dataset, kind_of, read_records, what_was_meant
from .parsing import BadRowError, Record, RowError
from .prompts import Kind, PromptSet, Scorer, apart, as_prompts, general_prompts, leaked_rows, load_prompts
from .reading import DataReport, ReadOptions, named, open_source
from .rows import (
    as_rows,
    conversation,
    labelled_harmful,
    load_rows,
    poison,
    rows_sha256,
    split_by_label,
    without_harmful,
)
from .suites import load_suite, suites

__all__ = ["OTHER_TEMPLATE", "Batch", "EncodedRow", "TemplateError", "collate", "encode_row", "encode_rows"]
__all__ += ["between_turns", "left_out", "lost_turns", "opening_of_answers"]
__all__ += ["Columns", "Format", "Row", "conversation_of", "safety_label", "with_class_names"]
__all__ += ["KINDS", "PREFIX", "HubDataset", "encoding_of", "hub_dataset", "kind_of", "read_records", "what_was_meant"]
__all__ += ["BadRowError", "Record", "RowError"]
__all__ += ["Kind", "PromptSet", "Scorer", "apart", "as_prompts", "general_prompts", "leaked_rows", "load_prompts"]
__all__ += ["DataReport", "ReadOptions", "named", "open_source"]
__all__ += ["as_rows", "conversation", "labelled_harmful", "load_rows", "poison", "rows_sha256", "split_by_label"]
__all__ += ["without_harmful"]
__all__ += ["load_suite", "suites"]
