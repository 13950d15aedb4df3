"""Regularized training, fused: an optimizer step, and penalty, clipping, dropout and max norm on their own."""

__version__ = "0.1.0"

from regfused import reference
from regfused.adam import Adam, AdamW
from regfused.build import build_info
from regfused.clip_grad_norm import clip_grad_norm_, grad_norm
from regfused.convert import Conversion, convert
from regfused.dropout import Dropout, dropout
from regfused.max_norm import constrain_max_norm_
from regfused.path import path
from regfused.path_result import RegularizationPath
from regfused.penalties import elastic_net, param_groups
from regfused.penalty import penalty
from regfused.schedule import OptionScheduler, ramp, warmup
from regfused.sgd import SGD
from regfused.shrink import shrink
from regfused.sparsity import sparsity

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Conversion",
    "Dropout",
    "OptionScheduler",
    "RegularizationPath",
    "build_info",
    "clip_grad_norm_",
    "constrain_max_norm_",
    "convert",
    "dropout",
    "elastic_net",
    "grad_norm",
    "param_groups",
    "path",
    "penalty",
    "ramp",
    "reference",
    "shrink",
    "sparsity",
    "warmup",
]
