"""Regularized training in one fused optimizer step: L1, L2, elastic net, weight decay, momentum and clipping."""

from regfused import reference
from regfused.sgd import SGD

__version__ = "0.1.0"

__all__ = ["SGD", "reference"]
