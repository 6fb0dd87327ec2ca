"""The method in plain PyTorch: the E-, L- and P-adapter. Needs torch and jaxtyping alone."""

from .modules import ACTIVATIONS, EAdapter, LAdapter, PAdapter, Tap, TapSum

__all__ = ["ACTIVATIONS", "EAdapter", "LAdapter", "PAdapter", "Tap", "TapSum"]
