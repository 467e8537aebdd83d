"""Judges of answers: by phrases, by models (guards, classifiers), by likelihood, by a function of yours."""

from .base import VERDICTS, Judge, Verdict
from .likelihood import LikelihoodJudge
from .models import CLASSIFIER, GUARDS, ClassifierJudge, FunctionJudge, GuardFormat, GuardJudge
from .named import DEFAULT, check_judges, make_judges
from .phrases import PhraseJudge
from .quality import quality

__all__ = [
    "CLASSIFIER",
    "DEFAULT",
    "GUARDS",
    "VERDICTS",
    "ClassifierJudge",
    "FunctionJudge",
    "GuardFormat",
    "GuardJudge",
    "Judge",
    "LikelihoodJudge",
    "PhraseJudge",
    "Verdict",
    "check_judges",
    "make_judges",
    "quality",
]
