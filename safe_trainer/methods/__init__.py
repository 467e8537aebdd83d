"""The methods, by name: one file each, and this table the only place that lists them."""

from .asft import AsFT
from .base import SafetyMethod
from .constrained_sft import ConstrainedSFT
from .refusal_anchor import RefusalAnchor
from .safe_grad import SafeGrad
from .salora import SaLoRA
from .security_vectors import SecurityVectors

METHODS: dict[str, type[SafetyMethod]] = {
    "asft": AsFT,
    "salora": SaLoRA,
    "security_vectors": SecurityVectors,
    "refusal_anchor": RefusalAnchor,
    "constrained_sft": ConstrainedSFT,
    "safe_grad": SafeGrad,
}
