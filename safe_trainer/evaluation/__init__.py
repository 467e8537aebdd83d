"""Before and after, with numbers that a careful person would trust: generation, judges, statistics, reports."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import compare
from .comparison import Comparison, Flip, SafetyVerdict
from .evaluate import evaluate, judged
from .gate import Thresholds, gate
from .generate import Answer, Decoding, generate
from .harness import Harness
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
from .report import to_html, to_markdown, write_report
from .results import Evaluation, SetResult, agreements
from .review import Question, Review
from .statistics import Agreement, Change, MeanScore, Rate, Spread, paired_change
from .storage import from_json, to_json
from .tasks import choice_match, exact_match, number_match

METRICS = Path(__file__).with_name("metrics")  # `evaluate.load(str(METRICS / "refusals"))`

if TYPE_CHECKING:
    from .monitor import RefusalMonitor

# fmt: off
__all__ = [
    "GUARDS", "METRICS", "Agreement", "Answer", "Change", "ClassifierJudge", "Comparison", "Decoding", "Evaluation",
    "Flip", "FunctionJudge", "GuardFormat", "GuardJudge", "Harness", "Judge", "LikelihoodJudge", "MeanScore",
    "PhraseJudge", "Question", "Rate", "RefusalMonitor", "Review", "SafetyVerdict", "SetResult", "Spread",
    "Thresholds", "Verdict", "agreements", "choice_match", "compare", "evaluate", "exact_match", "from_json", "gate",
    "generate", "judged", "number_match", "paired_change", "quality", "to_html", "to_json", "to_markdown",
    "write_report",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Load the monitor when it is asked for: it is a callback, which takes all of transformers' trainer to import."""
    if name != "RefusalMonitor":
        raise AttributeError(f"module `safe_trainer.evaluation` has no attribute `{name}`")
    from .monitor import RefusalMonitor

    return RefusalMonitor
