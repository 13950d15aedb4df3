"""Dropout: which elements are dropped, gradients, everything that torch's own does, and what is drawn and kept."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_runs import Graph
from step_cases import DEVICE, DTYPES, EMULATED, ON_CUDA_KERNELS
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import regfused
from regfused import extension, reference
from regfused.reference.dropout import by_seed, draw_seed, factor_like, philox, random_bits

CSRC = Path(__file__).parents[1] / "csrc"

dropout_op = torch.ops.regfused.dropout
dropout_op_ = torch.ops.regfused.dropout_

BOTH = pytest.mark.parametrize("module", (regfused, reference), ids=("kernels", "reference"))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Around vectors, runs of 16, rows of 64 and chunks of 4096 elements; the last one is for several threads.
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 4095, 4096, 4099, 16383, 16384, 16385, 100_001)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF)

# Zero is p = 2^-40, rounded; the last three round to 1 - 2^-32, to 1, and are 1.
PROBABILITIES = (0.1, 0.5, 1 / 3, 2.0**-16, 2.0**-32, 2.0**-40, 1 - 2.0**-32, 1 - 2.0**-40, 1.0)


def seed_of(value):
    return torch.tensor(value, dtype=torch.int64)


# Tensors of 24 elements with every kind of strides.
STRIDES = {
    "contiguous": lambda: torch.randn(2, 3, 4),
    "transposed": lambda: torch.randn(6, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "sliced": lambda: torch.randn(4, 12)[:, ::2],
    "permuted and sliced": lambda: torch.randn(4, 3, 4).permute(2, 0, 1)[:, ::2],
    "channels of channels last": lambda: torch.randn(2, 5, 2, 2).to(memory_format=torch.channels_last)[:, 1:4],
    "expanded": lambda: torch.randn(4, 1).expand(4, 6),
    "expanded in front": lambda: torch.randn(6).expand(4, 6),
    "starts anywhere": lambda: torch.randn(27)[3:],
    "negated": lambda: torch._neg_view(torch.randn(24)),
    "one element": lambda: torch.randn(1)[0],
}
EVERY_STRIDES = pytest.mark.parametrize("strides", STRIDES)


# --- Masks ----------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("p", PROBABILITIES)
def test_bits_of_the_reference(dtype, p, isa):
    for n, size in enumerate(SIZES):
        x = torch.randn(size).to(dtype)
        seed = seed_of(SEEDS[n % len(SEEDS)])
        got = dropout_op(x, p, seed)
        assert got.dtype == dtype and torch.equal(got, by_seed(x, p, seed)), size
        assert dropout_op_(x, p, seed) is None
        assert torch.equal(got, x), size


@EVERY_STRIDES
@EVERY_DTYPE
def test_strides(strides, dtype):
    x = STRIDES[strides]().to(dtype)
    seed = seed_of(5)
    got = dropout_op(x, 0.4, seed)
    assert torch.equal(got, by_seed(x, 0.4, seed))
    # What is dropped goes by the memory of the result.
    in_memory = torch.as_strided(got, (x.numel(),), (1,))
    factor = factor_like(torch.empty(x.numel(), dtype=dtype), 0.4, seed)
    assert torch.equal(in_memory == 0, factor == 0)
    for result in (got, by_seed(x, 0.4, seed)):
        assert result.stride() == torch.empty_like(x).stride() == functional.dropout(x).stride()


def test_every_bit_of_p_counts(isa):
    # With p * 2^32 = its own random bits an element is kept, with one more it is dropped.
    seed = seed_of(11)
    x = torch.ones(130)
    for i, bits in enumerate(random_bits(0, 3, seed)[:130].tolist()):
        assert dropout_op(x, bits / 2**32, seed)[i] != 0
        assert dropout_op(x, (bits + 1) / 2**32, seed)[i] == 0


def test_neighbours_in_memory_stay():
    for dtype in DTYPES:
        for size in (1, 63, 64, 65, 200):
            for offset in range(9):
                around = torch.full((size + 32,), 7.0, dtype=dtype)
                x = around[offset : offset + size]
                dropout_op_(x, 0.5, seed_of(3))
                assert torch.equal(x, by_seed(torch.full((size,), 7.0, dtype=dtype), 0.5, seed_of(3)))
                assert (around[:offset] == 7).all() and (around[offset + size :] == 7).all()


@pytest.mark.cpu
def test_same_bits_for_any_number_of_threads(isa, threads):
    x = torch.randn(300_001)
    want = by_seed(x, 0.3, seed_of(9))
    for count in (1, 2, 3, 4):
        threads(count)
        assert torch.equal(dropout_op(x, 0.3, seed_of(9)), want)


# Salmon and others: kat_vectors of Random123, philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "00000000 00000000 00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
}


@pytest.mark.parametrize("asked", KNOWN_ANSWERS)
def test_known_answers_of_philox_in_the_reference(asked):
    words = [torch.tensor(int(word, 16)) for word in asked.split()]
    answer = philox(tuple(words[:4]), tuple(words[4:]))
    assert " ".join(f"{word.item():08x}" for word in answer) == KNOWN_ANSWERS[asked]


RULES = r"""
#include <immintrin.h>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include "cpu/dropout_row.h"
using namespace regfused;

// Lanes that differ, of which the asked one is the last.
template <class V>
void known_answer(const uint64_t (&w)[6]) {
  PhiloxWords<V> counter;
  for (int i = 0; i < 4; ++i) counter.word[i] = splat<V>(w[i]);
  uint64_t lanes[sizeof(V) / 8];
  memcpy(lanes, &counter.word[0], sizeof(V));
  for (size_t j = 0; j + 1 < sizeof(V) / 8; ++j) lanes[j] = w[0] + 77 * j + 1;
  memcpy(&counter.word[0], lanes, sizeof(V));
  const PhiloxWords<V> words = philox(counter, w[5] << 32 | w[4]);
  for (int i = 0; i < 4; ++i) {
    memcpy(lanes, &words.word[i], sizeof(V));
    printf("%08" PRIx32 "%c", uint32_t(lanes[sizeof(V) / 8 - 1]), i < 3 ? ' ' : '\n');
  }
}

int main() {
  char what[16];
  while (scanf("%15s", what) == 1) {
    if (!strcmp(what, "philox")) {
      uint64_t w[6];
      for (auto& word : w) if (scanf("%" SCNx64, &word) != 1) return 1;
      known_answer<uint64_t>(w);
      known_answer<DoubleBits>(w);
    } else {
      int64_t row, seed;
      int upper;
      if (scanf("%" SCNd64 "%" SCNd64 "%d", &row, &seed, &upper) != 3) return 1;
      const DropoutRow random(row, uint64_t(seed), uint16_t(upper));
      uint32_t bits[kDropoutRow];
      memcpy(bits, random.bits, sizeof bits);
      for (uint32_t word : bits) printf("%" PRIu32 " ", word);
      printf("\n");
    }
  }
}
"""

INSTRUCTIONS = {"plain": (16, ""), "avx2": (32, "-mavx2"), "avx512": (64, "-mavx512f -mavx512bw -mavx512dq -mavx512vl")}


@pytest.mark.cpu
@pytest.mark.skipif(shutil.which("g++") is None or not CSRC.exists(), reason="no g++, or no sources beside a wheel")
def test_known_answers_of_philox_and_rows_far_out_in_the_rules(isa, tmp_path):
    width, options = INSTRUCTIONS[isa]
    (tmp_path / "rules.cpp").write_text(RULES)
    command = f"g++ -std=c++20 -O1 -Wno-psabi -DREGFUSED_ISA={isa} -DREGFUSED_VECTOR_BYTES={width} {options} -I{CSRC}"
    subprocess.run([*command.split(), "rules.cpp", "-o", "rules"], cwd=tmp_path, check=True, timeout=120)
    rows = [(row, seed) for row in (0, 1, 2**29 - 1, 2**29, 2**40 + 3) for seed in SEEDS]
    # An upper half that an element of the row has, so that the lower ones are computed.
    bits = [random_bits(row, 1, seed_of(seed)) for row, seed in rows]
    asked = [f"philox {words}" for words in KNOWN_ANSWERS]
    asked += [f"row {row} {seed} {of[17] >> 16}" for (row, seed), of in zip(rows, bits, strict=True)]
    run = subprocess.run([tmp_path / "rules"], input="\n".join(asked), capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert lines[0 : 2 * len(KNOWN_ANSWERS) : 2] == lines[1 : 2 * len(KNOWN_ANSWERS) : 2]
    assert lines[0 : 2 * len(KNOWN_ANSWERS) : 2] == list(KNOWN_ANSWERS.values())
    for line, want in zip(lines[2 * len(KNOWN_ANSWERS) :], bits, strict=True):
        assert line.split() == [str(word) for word in want.tolist()]


# --- Values and gradients -------------------------------------------------------------------------


@BOTH
@EVERY_DTYPE
@pytest.mark.parametrize("inplace", (False, True))
def test_forward_and_backward_against_float64(module, dtype, inplace, isa):
    # Two roundings: of the product, and of what is stored; half the spacing of subnormals, where eps means nothing.
    limits = torch.finfo(dtype)
    tolerance = dict(rtol=limits.eps, atol=limits.smallest_normal * limits.eps / 2)
    for size in SIZES[1:]:
        x = torch.randn(size).to(dtype).requires_grad_()
        g = torch.randn(size).to(dtype)
        state = torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
        y = module.dropout(x * 1 if inplace else x, 0.3, inplace=inplace)
        y.backward(g)
        (torch.set_rng_state if DEVICE == "cpu" else torch.cuda.set_rng_state)(state)
        factor = factor_like(x, 0.3, draw_seed(x.device)).double()
        torch.testing.assert_close(y.double(), x.double() * factor, **tolerance)
        torch.testing.assert_close(x.grad.double(), g.double() * factor, **tolerance)


@EVERY_STRIDES
@pytest.mark.parametrize("grad", ["as the output", "contiguous", "expanded", "transposed", "sliced"])
def test_gradients_of_other_strides_meet_the_mask_of_the_output(strides, grad):
    x = STRIDES[strides]().detach().requires_grad_()
    y = regfused.dropout(x, 0.5)
    g = {
        "as the output": lambda: torch.randn_like(y),
        "contiguous": lambda: torch.randn(y.shape),
        "expanded": lambda: torch.tensor(3.0).expand(y.shape),
        "transposed": lambda: torch.randn(y.shape[::-1]).permute(list(range(y.dim()))[::-1]),
        "sliced": lambda: torch.randn((*y.shape, 2))[..., 0],
    }[grad]()
    y.backward(g)
    assert torch.equal(x.grad, g * torch.where(y == 0, 0.0, 2.0))


@pytest.mark.parametrize("function", [dropout_op, by_seed], ids=["kernels", "reference"])
def test_gradcheck(function):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    call = lambda x: function(x, 0.4, seed_of(1)) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
    assert torch.autograd.gradcheck(lambda x: function(x.t()[::2], 0.4, seed_of(1)), (x,))


def test_a_view_in_place():
    x = torch.randn(6, 10, requires_grad=True)
    y = x * 1
    regfused.dropout(y[2:4], inplace=True)
    regfused.dropout(y[:, ::3], 0.25, inplace=True)
    y.sum().backward()
    torch.testing.assert_close(x * x.grad, y)
    assert ((y == 0).sum(0) > 0).any() and (x.grad > 2).any()


def test_all_that_is_kept_is_a_seed():
    x = torch.randn(1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = regfused.dropout(x)
        regfused.dropout(x * 1, inplace=True)
    assert [(t.shape, t.dtype) for t in kept] == [((), torch.int64)] * 2
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


# --- As torch ---------------------------------------------------------------------------------------


@BOTH
def test_identities(module):
    for x in (torch.randn(5), torch.arange(3), torch.randn(3, dtype=torch.complex64), torch.randn(3).to_sparse()):
        for kwargs in ({"p": 0.0}, {"p": 0}, {"training": False}, {"p": 1.0, "training": False}):
            for inplace in (False, True):
                assert module.dropout(x, inplace=inplace, **kwargs) is x
                assert functional.dropout(x, inplace=inplace, **kwargs) is x
        assert module.Dropout().eval()(x) is x
    empty = torch.empty(0, 3)
    assert module.dropout(empty) is empty and functional.dropout(empty) is empty
    leaf = torch.randn(3, requires_grad=True)
    assert module.dropout(leaf, 0.0, inplace=True) is leaf


@BOTH
@EVERY_DTYPE
def test_what_is_not_finite(module, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0]).to(dtype)
    ours, theirs = module.dropout(x, 1.0), functional.dropout(x, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit()[3:], theirs.signbit()[3:])
    y = module.dropout(x.repeat(100), 0.5).view(100, 5)
    assert y[:, 0].isnan().all() and (y[:, 1].isnan() | (y[:, 1] == math.inf)).all()
    assert y[:, 1].isnan().any() and y[:, 1].isinf().any()


@BOTH
def test_in_place(module):
    x = torch.ones(1000)
    version = x._version
    assert module.dropout(x, inplace=True) is x
    assert x._version == version + 1 and set(x.tolist()) == {0.0, 2.0}
    leaf = torch.ones(1000, requires_grad=True)
    for wrong in (leaf, leaf[1:]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            module.dropout(wrong, inplace=True)
    assert (leaf == 1).all() and leaf._version == 0
    with torch.no_grad():
        assert module.dropout(leaf, inplace=True) is leaf and leaf._version == 1
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        module.dropout(torch.ones(3).expand(4, 3), inplace=True)
    needed = torch.ones(10, requires_grad=True).exp()
    module.dropout(needed, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()
    with torch.inference_mode():
        assert set(module.dropout(torch.ones(1000), inplace=True).tolist()) == {0.0, 2.0}
    sliced = torch.ones(100, 2)
    assert module.dropout(sliced[:, 0], inplace=True) is not None
    assert (sliced[:, 0] == 0).any() and (sliced[:, 1] == 1).all()


@BOTH
def test_module(module):
    ours, theirs = module.Dropout(0.2, inplace=True), torch.nn.Dropout(0.2, inplace=True)
    assert isinstance(ours, torch.nn.Dropout) and repr(ours) == repr(theirs) and not ours.state_dict()
    assert (ours.p, ours.inplace, ours.training) == (0.2, True, True)
    ours.p = 2
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], but got 2"):
        ours(torch.ones(3))


@BOTH
@pytest.mark.parametrize(
    "p, message",
    [
        (-0.1, r"p must be in \[0, 1\], but got -0.1"),
        (1.5, r"p must be in \[0, 1\], but got 1.5"),
        (math.nan, r"p must be in \[0, 1\], but got nan"),
        (math.inf, r"p must be in \[0, 1\], but got inf"),
        ("0.5", r"p must be a number, but got '0.5' \(str\)"),
        (None, r"p must be a number, but got None"),
        (torch.ones(2), r"p must be a number or a tensor with 1 element"),
    ],
)
def test_p_that_is_none(module, p, message):
    x = torch.ones(5)
    state = torch.get_rng_state()
    for call in (
        lambda: module.dropout(x, p, inplace=True),
        lambda: module.dropout(x, p, training=False),
        lambda: module.Dropout(p),
    ):
        with pytest.raises(ValueError, match="dropout: " + message):
            call()
    assert (x == 1).all() and torch.equal(state, torch.get_rng_state())


@BOTH
@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool))
def test_integers(module, dtype):
    x = torch.ones(5, dtype=dtype)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=f"dropout: input must be floating point, but got {dtype}"):
            module.dropout(x, inplace=inplace)
    assert (x == 1).all()


@pytest.mark.parametrize(
    "x, p, seed, message",
    [
        (torch.ones(3), 1.5, seed_of(0), r"p must be in \[0, 1\], but got 1.5"),
        (torch.ones(3), math.nan, seed_of(0), r"p must be in \[0, 1\], but got nan"),
        (torch.ones(3).int(), 0.5, seed_of(0), "input must be float32, float64, bfloat16 or float16, but got Int"),
        (torch.ones(3), 0.5, torch.tensor(0.0), "seed must be a 0-dim int64 tensor .* dtype Float"),
        (torch.ones(3), 0.5, seed_of([0, 1]), "seed must be a 0-dim int64 tensor .* has 1 dimensions"),
    ],
)
def test_errors_of_the_operators(x, p, seed, message):
    for device in (x.device, "meta"):
        on_device = x.clone().to(device)
        for op in (dropout_op, dropout_op_):
            with pytest.raises(ValueError, match="regfused::dropout: " + message):
                op(on_device, p, seed.to(device))
    assert (x == 1).all()


@BOTH
def test_others_go_to_torch(module):
    class Tagged(torch.Tensor):
        pass

    x = torch.ones(1000).as_subclass(Tagged)
    assert type(module.dropout(x)) is Tagged
    for wrong in (torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(NotImplementedError):
            module.dropout(wrong)
    assert module.dropout(torch.ones(3, device="meta")).shape == (3,)
    assert module.dropout(torch.nn.Parameter(torch.ones(1000))).grad_fn is not None
    with pytest.raises(TypeError, match="must be Tensor"):
        module.dropout([1.0])


@pytest.mark.parametrize("randomness", ("different", "same"))
def test_transforms_of_functions(randomness):
    y = torch.vmap(regfused.dropout, randomness=randomness)(torch.ones(2, 1000))
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    assert set(torch.func.grad(lambda x: regfused.dropout(x).sum())(torch.ones(1000)).tolist()) == {0.0, 2.0}
    with forward_ad.dual_level():
        y = regfused.dropout(forward_ad.make_dual(torch.ones(1000), torch.ones(1000)))
        assert torch.equal(y, forward_ad.unpack_dual(y).tangent)
    # And the kernels are there again afterwards.
    torch.manual_seed(1)
    y = regfused.dropout(torch.ones(1000))
    torch.manual_seed(1)
    assert torch.equal(y, reference.dropout(torch.ones(1000)))


def test_without_the_compiled_part(monkeypatch):
    x = torch.randn(1000)
    torch.manual_seed(1)
    want = regfused.dropout(x, 0.3)
    monkeypatch.setattr(extension, "C", None)
    torch.manual_seed(1)
    assert torch.equal(regfused.dropout(x, 0.3), want)


# --- Seeds ------------------------------------------------------------------------------------------


@BOTH
def test_one_seed_is_drawn_for_a_call(module):
    generator = torch.Generator(DEVICE).manual_seed(5)
    want = torch.randint(2**63 - 1, (), generator=generator)
    for inplace in (False, True):
        torch.manual_seed(5)
        y = module.dropout(torch.ones(1000), 0.25, inplace=inplace)
        assert torch.equal(y, by_seed(torch.ones(1000), 0.25, want))
        state = torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
        assert torch.equal(state, generator.get_state())
        assert not torch.equal(y, module.dropout(torch.ones(1000), 0.25))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant):
    layer = torch.nn.Linear(20, 20)
    block = torch.nn.Sequential(layer, regfused.Dropout(0.4), torch.nn.Tanh(), regfused.Dropout(0.2))
    x = torch.randn(50, 20, requires_grad=True)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        x.grad = layer.weight.grad = None
        torch.manual_seed(3)
        y = run(x)
        regfused.dropout(x)  # by the backward pass the generator is elsewhere
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast():
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = regfused.dropout(torch.nn.Linear(4, 4)(torch.ones(2, 4)))
        assert y.dtype == torch.bfloat16 and regfused.dropout(torch.ones(3)).dtype == torch.float32


# --- Compiled -----------------------------------------------------------------------------------------


@pytest.mark.skipif(EMULATED, reason="it takes long, and what it looks at is in no kernel")
def test_opcheck():
    for x in (torch.randn(70), torch.randn(5, 7, requires_grad=True), torch.randn(6, 4).t(), torch.randn(6, 4)[:, ::2]):
        torch.library.opcheck(dropout_op.default, (x, 0.3, seed_of(1)))
    torch.library.opcheck(dropout_op_.default, (torch.randn(70), 0.3, seed_of(1)))


def test_compiled_in_one_graph():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), regfused.Dropout(0.5), regfused.Dropout(0.1, inplace=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 8, requires_grad=True)
    results = []
    for call in (compiled, compiled, model):
        x.grad = None
        torch.manual_seed(0)
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for y, grad in results[:2]:
        assert torch.equal(y, results[2][0]) and torch.equal(grad, results[2][1])
    assert not torch.equal(compiled(x), results[0][0])


def test_compiled_with_strides():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def f(x):
        return regfused.dropout(x * 2, 0.25).contiguous()

    for size in (4, 6):
        x = torch.randn(2, 3, size, 5).to(memory_format=torch.channels_last).requires_grad_()
        y = f(x)
        y.sum().backward()
        torch.testing.assert_close(y, x * x.grad)
        assert (y == 0).any()


# --- CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_CUDA_KERNELS, reason="no CUDA kernels")
def test_a_graph_reads_the_seed_at_replay():
    x, seed = torch.randn(1000), seed_of(1)
    y = x.clone()
    graph = Graph()
    with graph.capture():
        dropout_op_(y, 0.5, seed)
    assert not EMULATED or graph.launches == 1
    for value in (2, 3):
        seed.fill_(value)
        y.copy_(x)
        graph.replay()
        assert torch.equal(y, by_seed(x, 0.5, seed_of(value)))


@pytest.mark.skipif(DEVICE != "cuda", reason="torch's generator is not emulated")
def test_replays_draw_new_seeds():
    x = torch.ones(1000)
    regfused.dropout(x)
    graph = Graph()
    with graph.capture():
        y = regfused.dropout(x)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(y.clone())
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.skipif(not EMULATED, reason="looks into the emulator")
@pytest.mark.parametrize("multiprocessors", (1, 2, 1000))
@pytest.mark.parametrize("order", ("forward", "random"))
def test_same_bits_on_every_grid(multiprocessors, order, monkeypatch):
    monkeypatch.setenv("REGFUSED_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("REGFUSED_EMULATED_ORDER", order)
    for dtype in DTYPES:
        x = torch.randn(40_001).to(dtype)
        assert torch.equal(dropout_op(x, 0.3, seed_of(9)), by_seed(x, 0.3, seed_of(9)))


@pytest.mark.skipif(not EMULATED, reason="looks into the emulator")
def test_a_launch_that_fails():
    import ctypes

    ctypes.CDLL(os.environ["REGFUSED_TEST_EXTENSION"]).emulated_fail(0)
    with pytest.raises(RuntimeError, match="CUDA refused to launch the dropout kernel"):
        regfused.dropout(torch.ones(3))
