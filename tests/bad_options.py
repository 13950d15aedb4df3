"""Options that an optimizer must refuse, and what it must say: for all, for SGD, for Adam and AdamW."""

import torch

INF, NAN = float("inf"), float("nan")

OPTIONS = [
    ({"lr": -0.1}, "lr must be finite and >= 0, but got -0.1"),
    ({"lr": INF}, "lr must be finite and >= 0, but got inf"),
    ({"lr": NAN}, "lr must be finite and >= 0, but got nan"),
    ({"lr": "0.1"}, r"lr must be a number, but got '0.1' \(str\)"),
    ({"lr": None}, "lr must be a number, but got None"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be a number or a tensor with 1 element.*shape \(2,\)"),
    ({"weight_decay": -1e-4}, "weight_decay must be finite and >= 0, but got -0.0001"),
    ({"l1": -1.0}, "l1 must be finite and >= 0, but got -1.0"),
    ({"l1": -1.0, "proximal": True}, "l1 must be finite and >= 0, but got -1.0"),
    ({"l1": INF}, "l1 must be finite and >= 0, but got inf"),
    ({"l2": NAN}, "l2 must be finite and >= 0, but got nan"),
    ({"max_norm": -1.0}, "max_norm must be None or >= 0, but got -1.0"),
    ({"max_norm": NAN}, "max_norm must be None or >= 0, but got nan"),
    ({"max_norm": "1"}, "max_norm must be a number, but got '1'"),
    ({"norm_type": NAN}, "norm_type must be a number, but got nan"),
    ({"norm_type": "two"}, "norm_type must be a number, but got 'two'"),
    ({"nonfinite": "ignore"}, "nonfinite must be one of .*'skip'.*, but got 'ignore'"),
    ({"proximal": "yes"}, "proximal must be True or False, but got 'yes'"),
    ({"concavity": -1.0}, "concavity must be finite and >= 0, but got -1.0"),
    ({"keep_zeros": 0.5}, "keep_zeros must be True or False, but got 0.5"),
    ({"nonnegative": "no"}, "nonnegative must be True or False, but got 'no'"),
    ({"group_l1": NAN}, "group_l1 must be finite and >= 0, but got nan"),
    ({"penalty_in_clip": None}, "penalty_in_clip must be True or False, but got None"),
]
OPTIONS_OF_SGD = [
    ({"momentum": -1.0}, "momentum must be finite and >= 0, but got -1.0"),
    ({"dampening": NAN}, "dampening must be finite, but got nan"),
    ({"decoupled_weight_decay": 0.1}, "decoupled_weight_decay must be True or False, but got 0.1"),
]
OPTIONS_OF_ADAM = [
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be >= 0 and < 1, but got 1.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be >= 0 and < 1, but got -0.1"),
    ({"betas": (0.9, NAN)}, r"betas\[1\] must be >= 0 and < 1, but got nan"),
    ({"betas": 0.9}, "betas must be a pair of numbers, but got 0.9"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas must be a pair of numbers, but got "),
    ({"betas": (0.9, "1")}, r"betas\[1\] must be a number, but got '1'"),
    ({"betas": (torch.ones(2), torch.ones(2))}, r"betas\[0\] must be a number or a tensor with 1 element"),
    ({"eps": -1e-8}, "eps must be finite and >= 0, but got -1e-08"),
    ({"eps": INF}, "eps must be finite and >= 0, but got inf"),
    ({"eps": None}, "eps must be a number, but got None"),
    ({"amsgrad": "yes"}, "amsgrad must be True or False, but got 'yes'"),
    ({"decoupled_proximal": "yes"}, "decoupled_proximal must be True or False, but got 'yes'"),
]
# What a new group may not have, but one that is there may come to.
NEW_OF_SGD = [
    ({"nesterov": True}, "nesterov demands a momentum and zero dampening, but got momentum=0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov demands .*dampening=0.1"),
    ({"classical_momentum": True, "momentum": 0.9, "dampening": 0.1}, "classical_momentum has no dampening"),
]
NEW_OF_ADAM = [
    ({"betas": (torch.tensor(0.9), 0.999)}, "betas must be two numbers or two tensors"),
    ({"lr": torch.tensor(0.1), "foreach": True}, "foreach=True demands numbers or capturable=True, but lr is a tensor"),
]
