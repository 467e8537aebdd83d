"""The methods, by name: one file each, and this table the only place that lists them."""

from .asft import AsFT
from .base import FormField, Materials, MethodCard, Paper, PenaltyMethod, SafetyMethod, SelfCheck
from .drift_penalty import DriftPenalty
from .refusal_anchor import RefusalAnchor
from .salora import SaLoRA
from .security_vectors import SecurityVectors

METHODS: dict[str, type[SafetyMethod]] = {
    "asft": AsFT,
    "salora": SaLoRA,
    "security_vectors": SecurityVectors,
    "refusal_anchor": RefusalAnchor,
    "drift_penalty": DriftPenalty,
}

__all__ = [
    "METHODS",
    "AsFT",
    "DriftPenalty",
    "FormField",
    "Materials",
    "MethodCard",
    "Paper",
    "PenaltyMethod",
    "RefusalAnchor",
    "SaLoRA",
    "SafetyMethod",
    "SecurityVectors",
    "SelfCheck",
]
