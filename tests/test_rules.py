"""The tables of rules, in C++, in Python, and in constructors and operators: they agree."""

import inspect

import pytest
import torch

import regfused
from regfused import extension, options, reference
from regfused.reference.rule import Rule

pytestmark = pytest.mark.skipif(extension.C is None, reason="no compiled part")

CLASSES = (regfused.SGD, regfused.Adam, regfused.AdamW)
RULES = {rule.name: rule for rule in Rule.KNOWN}

# Where torch's pure-Python step keeps its count: the kernels have no use for it.
IN_PYTHON_ALONE = {"capturable"}


def test_every_rule_has_kernels():
    assert set(extension.C.rules()) - {""} == set(RULES)
    assert {cls._rule.name for cls in CLASSES} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_options_and_slots(name):
    compiled, rule = extension.C.rules()[name], RULES[name]
    assert compiled["options"] == {o: kind for o, kind in rule.options.items() if o not in IN_PYTHON_ALONE}
    assert tuple(compiled["slots"]) == rule.slots
    assert compiled["counts_steps"] == rule.counts_steps
    assert set(compiled["options"]).isdisjoint(extension.C.rules()[""]["options"])


def test_options_of_the_engine():
    compiled = extension.C.rules()[""]["options"]
    assert {name for name, kind in compiled.items() if kind == "strength"} == set(options.strengths_of(Rule()))
    assert set(compiled) <= set(options.names_of(Rule()))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_constructors(cls):
    ours = inspect.signature(cls).parameters
    twin = inspect.signature(getattr(reference, cls.__name__)).parameters
    theirs = inspect.signature(getattr(torch.optim, cls.__name__)).parameters
    assert list(ours.items()) == list(twin.items())
    # torch's arguments, with its defaults, by position as there.
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    # Every option, and nothing else; AdamW decides about its decay by itself. The norm group is the optimizer's.
    fixed = {"decoupled_weight_decay"} if cls is regfused.AdamW else set()
    assert set(ours) - {"params", "norm_group"} == set(options.names_of(cls._rule)) - fixed
    assert cls([torch.nn.Parameter(torch.ones(1))]).param_groups[0].keys() - {"params"} == set(
        options.names_of(cls._rule)
    )


@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_operators(cls):
    schema = getattr(torch.ops.regfused, f"{cls._rule.name}_").default._schema
    defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only and a.name != "lr"}
    signature = inspect.signature(cls).parameters
    for name, value in defaults.items():
        given = signature[name].default
        assert value == (list(given) if isinstance(given, tuple) else given), name
    assert set(defaults) | {"lr"} == set(options.names_of(cls._rule)) - IN_PYTHON_ALONE - {
        "foreach",
        "fused",
        "differentiable",
    }
