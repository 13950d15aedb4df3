"""The pure-PyTorch twin of regfused: the same names and signatures, the formula written once more, in torch operations.

It is what runs where the compiled part is missing or a tensor is not for the kernels, and the witness in parity tests.
"""

from regfused.reference.max_norm import constrain_max_norm_
from regfused.reference.sgd import SGD

__all__ = ["SGD", "constrain_max_norm_"]
