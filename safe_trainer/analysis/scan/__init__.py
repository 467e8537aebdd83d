"""Finding harmful rows before training: how much of a row's loss do security vectors take away?

`scoring` asks the model, `ranking` keeps what it says on disk and in order, `tables` writes files, `curve` says how
good a ranking is where the truth is known, `files` is the whole way from one file to another.
"""

from .curve import average_precision, precision_recall
from .files import ScanResult, scan_file
from .scoring import Score, score_rows

__all__ = ["ScanResult", "Score", "average_precision", "precision_recall", "scan_file", "score_rows"]
