"""Before and after, with numbers that a careful person would trust: generation, judges, statistics, reports."""

from typing import TYPE_CHECKING, Any

from .agreement import Agreement, agreements
from .answers import Answer, Decoding
from .comparison import Comparison, Flip
from .conclusions import Conclusion, conclude
from .examination import evaluate, exact_match, judged
from .gating import Limits, gate
from .general import general_prompts
from .generation import generate
from .guard_formats import GUARDS, GuardFormat
from .html import to_html
from .judge_quality import quality
from .judges import Judge, PhraseJudge, Verdict
from .likelihood import LikelihoodJudge
from .markdown import to_markdown
from .means import Mean
from .metric_modules import METRICS
from .model_judges import ClassifierJudge, FunctionJudge, GuardJudge
from .report import write_report
from .results import Evaluation, SetResult
from .seeds import Spread, across_runs
from .statistics import Change, Rate, paired_change
from .storage import from_json, to_json
from .switching import compare
from .task_quality import perplexity, rouge, scored, token_f1

if TYPE_CHECKING:
    from .monitor import Floor, RefusalMonitor

__all__ = [
    "Agreement",
    "Answer",
    "Change",
    "ClassifierJudge",
    "Comparison",
    "Conclusion",
    "Decoding",
    "Evaluation",
    "Flip",
    "Floor",
    "FunctionJudge",
    "GUARDS",
    "GuardFormat",
    "GuardJudge",
    "Judge",
    "LikelihoodJudge",
    "Limits",
    "METRICS",
    "Mean",
    "PhraseJudge",
    "Rate",
    "RefusalMonitor",
    "SetResult",
    "Spread",
    "Verdict",
    "across_runs",
    "agreements",
    "compare",
    "conclude",
    "evaluate",
    "exact_match",
    "from_json",
    "gate",
    "general_prompts",
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
    if name not in ("Floor", "RefusalMonitor"):
        raise AttributeError(f"module `safe_trainer.evaluation` has no attribute `{name}`")
    from . import monitor

    return getattr(monitor, name)
