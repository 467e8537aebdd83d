"""Moved to `lora.modes`."""

from .lora.modes import trainable_layout

__all__ = ["trainable_layout"]
