"""The landscape of safety around a model: along its alignment direction, across it, and where fine-tuning went."""

from .axes import Axes, axes
from .exploring import measure_landscape
from .figure import draw, write_landscape
from .moving import moving
from .record import Landscape, Place

__all__ = ["Axes", "Landscape", "Place", "axes", "draw", "measure_landscape", "moving", "write_landscape"]
