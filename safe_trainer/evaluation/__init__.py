"""Before and after, with numbers that a careful person would trust: generation, judges, statistics, reports."""

from typing import TYPE_CHECKING, Any

from .compare import compare
from .evaluate import evaluate, judged
from .gate import SafetyVerdict, Thresholds, gate
from .generate import Answer, Decoding, generate
from .judges import (
    GUARDS,
    ClassifierJudge,
    FunctionJudge,
    GuardFormat,
    GuardJudge,
    Judge,
    LikelihoodJudge,
    PhraseJudge,
    Verdict,
    quality,
)
from .metric_modules import METRICS
from .report import to_html, to_markdown, write_report
from .results import Comparison, Evaluation, Flip, SetResult, agreements
from .statistics import Agreement, Change, Mean, Rate, Spread, across_runs, paired_change
from .storage import from_json, to_json
from .tasks import exact_match, perplexity, rouge, scored, token_f1

if TYPE_CHECKING:
    from .monitor import RefusalMonitor

__all__ = [
    "Agreement",
    "Answer",
    "Change",
    "ClassifierJudge",
    "Comparison",
    "Decoding",
    "Evaluation",
    "Flip",
    "FunctionJudge",
    "GUARDS",
    "GuardFormat",
    "GuardJudge",
    "Judge",
    "LikelihoodJudge",
    "METRICS",
    "Mean",
    "PhraseJudge",
    "Rate",
    "RefusalMonitor",
    "SafetyVerdict",
    "SetResult",
    "Spread",
    "Thresholds",
    "Verdict",
    "across_runs",
    "agreements",
    "compare",
    "evaluate",
    "exact_match",
    "from_json",
    "gate",
    "generate",
    "judged",
    "paired_change",
    "perplexity",
    "quality",
    "rouge",
    "scored",
    "to_html",
    "to_json",
    "to_markdown",
    "token_f1",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load the monitor when it is asked for: it is a callback, which takes all of transformers' trainer to import."""
    if name != "RefusalMonitor":
        raise AttributeError(f"module `safe_trainer.evaluation` has no attribute `{name}`")
    from .monitor import RefusalMonitor

    return RefusalMonitor
