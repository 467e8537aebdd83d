"""Security vectors: fitted once to harmful rows, at work while another model learns, then gone.

`fitting`, `inputs` and `loop` fit them, `weights`, `card` and `identity` keep them on disk and know their model,
`hooks` puts them to work. They are harmful by construction: see [`TrainedVectors`].
"""

from .fitting import Fitting, fitted_layers, targets, train_security_vectors
from .hooks import VectorFactors, active, check_foldable
from .losses import row_losses
from .weights import TrainedVectors

__all__ = [
    "Fitting",
    "TrainedVectors",
    "VectorFactors",
    "active",
    "check_foldable",
    "fitted_layers",
    "row_losses",
    "targets",
    "train_security_vectors",
]
