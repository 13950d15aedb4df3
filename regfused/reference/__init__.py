"""The pure-PyTorch twin of regfused: the same names and signatures, the formula written once more, in torch operations.

It is what runs where the compiled part is missing or a tensor is not for the kernels, and the witness in parity tests.
"""

from regfused.reference.adam import Adam, AdamW
from regfused.reference.clip_grad_norm import clip_grad_norm_, grad_norm
from regfused.reference.dropout import Dropout, dropout
from regfused.reference.max_norm import constrain_max_norm_
from regfused.reference.penalty import penalty
from regfused.reference.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Dropout",
    "clip_grad_norm_",
    "constrain_max_norm_",
    "dropout",
    "grad_norm",
    "penalty",
]
