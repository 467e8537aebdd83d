"""What a fine-tune changed: how far each layer moved, and what of it touches safety."""

from typing import TYPE_CHECKING, Any

from .figure import write_drift
from .measuring import Drift, LayerDrift, measure_drift
from .refusals import RefusalChange, refusal_changes, refusal_directions
from .subspaces import Subspaces
from .updates import Factors

if TYPE_CHECKING:
    from .monitor import DriftMonitor

__all__ = [
    "Drift",
    "DriftMonitor",
    "Factors",
    "LayerDrift",
    "RefusalChange",
    "Subspaces",
    "measure_drift",
    "refusal_changes",
    "refusal_directions",
    "write_drift",
]


def __getattr__(name: str) -> Any:
    """Load the monitor when it is asked for: it is a callback, which takes all of transformers' trainer to import."""
    if name != "DriftMonitor":
        raise AttributeError(f"module `safe_trainer.analysis.drift` has no attribute `{name}`")
    from .monitor import DriftMonitor

    return DriftMonitor
