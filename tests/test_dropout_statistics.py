"""Whether the masks of dropout look random: shares, correlations, positions, seeds.

Seeds are fixed, so that a test has one outcome. Statistics are held to 5 standard deviations: a right generator would
break such a bound for one seed in 1.7 million.
"""

import math

import pytest
import torch

from regfused.reference.dropout import random_bits

dropout_op = torch.ops.regfused.dropout

N = 1 << 18
BOUND = 5.0
SEEDS = (0, 1, 2, -1, 0x0123456789ABCDEF)


def mask(p, seed, n=N):
    """1 where an element is kept."""
    return (dropout_op(torch.ones(n), p, torch.tensor(seed, dtype=torch.int64)) != 0).double()


def chi_square(counts, expected, freedom=None):
    """As a number of standard deviations: the cube root of chi-square is nearly normal (Wilson and Hilferty, 1931)."""
    freedom = freedom or counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    scale = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", (0.001, 0.1, 0.5, 0.9))
def test_mean_and_variance(p, seed):
    x = torch.ones(N)
    y = dropout_op(x, p, torch.tensor(seed)).double()
    # Of y the mean is 1 and the variance p/(1 - p); those of N elements differ by the standard errors below.
    variance = p / (1 - p)
    assert abs(y.mean() - 1) < BOUND * math.sqrt(variance / N)
    fourth = (1 - p) * (1 / (1 - p) - 1) ** 4 + p
    assert abs((y - 1).square().mean() - variance) <= BOUND * math.sqrt((fourth - variance**2) / N)


@pytest.mark.parametrize("p", (0.1, 0.5))
@pytest.mark.parametrize("seed", SEEDS)
def test_correlation_with_what_comes_later(p, seed):
    # Lags of neighbours, of the halves of a word, of the words of a counter, of counters, rows, chunks and images.
    kept = (mask(p, seed) - (1 - p)) / math.sqrt(p * (1 - p))
    for lag in (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 224, 1024, 4096, 16384):
        z = (kept[:-lag] * kept[lag:]).sum() / math.sqrt(N - lag)
        assert abs(z) < BOUND, lag


@pytest.mark.parametrize("seed", SEEDS)
def test_strides(seed):
    # The mean of every second, third, ... element, from every start.
    kept = (mask(0.5, seed) - 0.5) * 2
    for stride in (2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 128):
        folded = kept[: N // stride * stride].view(-1, stride)
        z = folded.sum(0) / math.sqrt(folded.shape[0])
        assert z.abs().max() < BOUND, stride


@pytest.mark.parametrize("p", (0.1, 0.5))
def test_positions(p):
    # Each position of a row and of several rows is dropped as often as the others, over many seeds.
    seeds = torch.randint(2**63 - 1, (2000,)).tolist()
    positions = 256
    dropped = sum(1 - mask(p, seed, positions) for seed in seeds)
    counts = torch.stack([dropped, len(seeds) - dropped])
    expected = torch.tensor([[p], [1 - p]], dtype=torch.float64) * len(seeds)
    assert abs(chi_square(counts, expected, freedom=positions)) < BOUND


@pytest.mark.parametrize("seed", SEEDS)
def test_runs_of_eight(seed):
    # All patterns of eight neighbours are as likely.
    kept = mask(0.5, seed).view(-1, 8)
    patterns = (kept * 2 ** torch.arange(8)).sum(1).long()
    counts = torch.bincount(patterns, minlength=256).double()
    assert abs(chi_square(counts, torch.full_like(counts, N / 8 / 256))) < BOUND


def test_seeds_are_independent():
    # Neighbouring seeds, and seeds that differ in one bit.
    base = 0x0123456789ABCDEF
    kept = (mask(0.5, base) - 0.5) * 2
    for other in [base + 1, base - 1, *(base ^ (1 << bit) for bit in range(0, 63, 3))]:
        z = (kept * (mask(0.5, other) - 0.5) * 2).sum() / math.sqrt(N)
        assert abs(z) < BOUND, hex(other)


@pytest.mark.parametrize("shift", (0, 8, 16, 24))
def test_every_byte_of_the_random_bits(shift):
    # Those that decide in one element of 65536 only are looked at where all are computed.
    bits = random_bits(0, N // 64, torch.tensor(42))
    counts = torch.bincount(bits >> shift & 0xFF, minlength=256).double()
    assert abs(chi_square(counts, torch.full_like(counts, N / 256))) < BOUND


@pytest.mark.parametrize("p", (1e-5, 2.0**-17, 1 - 1e-5))
def test_p_is_no_multiple_of_a_small_power_of_two(p):
    # 2^-16 is all that sixteen bits can say.
    draws = 20 * N
    dropped = sum((1 - mask(p, seed)).sum().item() for seed in range(20))
    assert abs(dropped - draws * p) < BOUND * math.sqrt(draws * p * (1 - p))
