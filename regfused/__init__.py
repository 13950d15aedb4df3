"""Regularized training in one fused optimizer step: L1, L2, elastic net, weight decay, momentum and clipping."""

__version__ = "0.1.0"

from regfused import reference
from regfused.build import build_info
from regfused.dropout import Dropout, dropout
from regfused.penalties import elastic_net, param_groups
from regfused.sgd import SGD
from regfused.sparsity import sparsity

__all__ = ["SGD", "Dropout", "build_info", "dropout", "elastic_net", "param_groups", "reference", "sparsity"]
