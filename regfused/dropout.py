"""Dropout that keeps no mask: a seed is drawn, and the mask is computed from it whenever it is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_unary

from regfused import extension, reference
from regfused.reference.dropout import TENSORS, draw_seed, drops_nothing, is_for_torch, probability, recorded


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    r"""Each element becomes zero with probability ``p``; the others are scaled by ``1/(1 - p)``.

    Signature and semantics of ``torch.nn.functional.dropout``::

        y = x * factor            factor = 0 with probability p, 1/(1 - p) otherwise

    Each call draws one seed from torch's generator of the device (``torch.manual_seed`` sets it). The factors are
    computed from the seed and the element's place in memory by the counter-based generator Philox4x32-10 (Salmon,
    Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011), once in the forward and once more in
    the backward pass: the seed is all that is kept. The factors are the same for any number of threads, on any
    instruction set and device.

    A place in memory: inputs with equal elements and different strides get different masks. An input that is not
    dense in memory is copied first. Inputs that the kernels are not made for (other dtypes and devices, sparse and
    nested tensors, subclasses of ``Tensor``), and inputs under ``torch.func`` or forward-mode differentiation, go to
    torch's own dropout. So does what ``torch.jit`` scripts and traces, and what ``torch.export`` exports: it needs
    nothing but torch where it is loaded. ``torch.fx`` records a call as it does one of torch's own.

    Args:
        input: of any shape, strides and floating dtype. Arithmetic is float64 for float64, otherwise float32.
        p: probability of a zero, in [0, 1]; rounded to a multiple of 2\ :sup:`-32`. 0 is the identity. It gets no
            gradient.
        training: False: the identity.
        inplace: write into ``input``.

    Returns:
        A tensor of the same shape and dtype, with the strides of ``torch.empty_like(input)``; ``input`` itself where
        nothing is dropped (``p = 0``, not training, no elements) and in place. As in torch, a NaN or an infinity that
        is dropped becomes NaN.

    Raises:
        ValueError: for a ``p`` outside [0, 1], NaN, no number or a tensor that requires a gradient, and for an integer
            or boolean input of which something would be dropped. Nothing has changed then.

    Source:
        Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, Dropout: a simple way to prevent neural networks from
        overfitting (JMLR 2014).

    Example::

        >>> x = torch.ones(1000)
        >>> y = regfused.dropout(x, p=0.25)
        >>> sorted(set(y.tolist())) == [0, float(torch.tensor(1 / 0.75))]
        True
    """
    if not torch.jit.is_scripting():
        return _dropout(input, p, training, inplace)
    return nn.functional.dropout(input, p, training, inplace)


def _dropout(input: Tensor, p: float, training: bool, inplace: bool, module: nn.Module | None = None) -> Tensor:
    if type(input) in TENSORS:
        if type(p) is not float or not 0.0 <= p <= 1.0:
            p = probability(p)
        if torch.compiler.is_compiling():
            return _while_compiling(input, p, training, inplace)
        if not training or p == 0:
            return input
        if extension.C is None:
            return reference.dropout(input, p, training, inplace)
        done = extension.C.dropout(input, p, inplace)
        if done is not None:
            return done
    return _without_kernels(input, p, training, inplace, module)


def _without_kernels(input: Tensor, p: float, training: bool, inplace: bool, module: nn.Module | None) -> Tensor:
    if isinstance(input, Proxy):
        return recorded(dropout, Dropout, module, input, p, training, inplace)
    if type(input) in TENSORS:
        if has_torch_function_unary(input):  # a TorchFunctionMode, which sees what it would see of torch's
            result: Tensor = handle_torch_function(dropout, (input,), input, p=p, training=training, inplace=inplace)
            return result
        if drops_nothing(input, p, training):
            return input
    return nn.functional.dropout(input, probability(p), training, inplace)


def _while_compiling(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """Nothing here breaks a graph."""
    # In evaluation mode, too: tools that look into an exported program expect it.
    if extension.compiles_in_torch():
        return nn.functional.dropout(input, p, training, inplace)
    if drops_nothing(input, p, training):
        return input
    if input.device.type not in extension.DEVICES or is_for_torch(input):
        return nn.functional.dropout(input, p, training, inplace)
    output: Tensor = torch.ops.regfused.dropout(input, p, draw_seed(input.device))
    # A graph makes of it whatever is best: its tensors are not written in place anyway.
    return input.copy_(output) if inplace else output


class Dropout(nn.Dropout):
    """`dropout` as a module, in place of ``torch.nn.Dropout``, which it is a subclass of.

    Args:
        p: probability of a zero, in [0, 1], 0.5 by default.
        inplace: write into the input; False by default.

    Shapes, dtypes, errors and formula are those of `dropout`. The identity in evaluation mode, also of a graph module
    that ``torch.fx`` made of a model, and of a scripted one.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), regfused.Dropout(0.1))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Dropout(p=0.1, inplace=False)
        )
        >>> bool((model.eval()(torch.ones(4)) == model[0](torch.ones(4))).all())
        True
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        probability(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return _dropout(input, self.p, self.training, self.inplace, self)
        return nn.functional.dropout(input, self.p, self.training, self.inplace)
