"""Artifacts: made once from models or rows, saved with provenance, refused where they do not fit."""

from .alignment_direction import AlignmentDirection, DirectionFactors
from .fitting import Fitting, fitted_layers, row_losses, train_security_vectors
from .safety_basis import SafetyBasis
from .security_vectors import TrainedVectors, VectorFactors, active
from .store import load_artifact, save_artifact

__all__ = [
    "AlignmentDirection",
    "DirectionFactors",
    "Fitting",
    "SafetyBasis",
    "TrainedVectors",
    "VectorFactors",
    "active",
    "fitted_layers",
    "load_artifact",
    "row_losses",
    "save_artifact",
    "train_security_vectors",
]
