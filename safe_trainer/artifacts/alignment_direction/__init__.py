"""The alignment direction: what alignment did to each weight, from two checkpoints, as a few factors.

The way of a weight: `checkpoints` reads it from disk, `pairing` finds its counterpart and takes the difference,
`spectrum` finds the leading directions of that matrix, `factors` keeps them, `alignment` is the whole.
"""

from .alignment import AlignmentDirection
from .factors import DirectionFactors

__all__ = ["AlignmentDirection", "DirectionFactors"]
