"""Regularized training in one fused optimizer step: L1, L2, elastic net, weight decay, momentum and clipping."""

__version__ = "0.1.0"

from regfused import reference
from regfused.build import build_info
from regfused.max_norm import constrain_max_norm_
from regfused.penalties import elastic_net, param_groups
from regfused.sgd import SGD
from regfused.sparsity import sparsity

__all__ = ["SGD", "build_info", "constrain_max_norm_", "elastic_net", "param_groups", "reference", "sparsity"]
