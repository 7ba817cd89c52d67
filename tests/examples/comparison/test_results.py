"""What the numbers of several seeds say."""

import math
import statistics

import numpy as np
import pytest
from comparison.methods import Entry
from comparison.plan import Amount
from comparison.report import difference
from comparison.results import Result, half_width, interval, mean_and_spread, noise_of


def make_result(name, seed, delta_b, threads=None):
    return Result(Entry(name), Amount(8), seed, 0.1, {}, 1, 1, 1, 1.0, delta_b, True, threads)


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, statistics.stdev([1, 2, 6]))
    assert mean_and_spread([5.0]) == (5.0, 0.0)


def test_interval():
    # by hand: t is 4.303 with two degrees of freedom
    mean, half = interval([1.0, 2.0, 6.0])
    assert mean == 3.0 and half == pytest.approx(4.3027 * statistics.stdev([1, 2, 6]) / math.sqrt(3), rel=1e-4)
    assert interval([5.0]) == (5.0, math.inf)
    assert difference([1.0, 1.1, 0.9]) == "**+1.0 ± 0.2**" and difference([1.0, 2.0, 6.0]) == "+3.0 ± 6.6"
    assert difference([1.0]) == "+1.0 (one seed)" and difference([]) == "-"


def test_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [interval(list(random.normal(7.0, 2.0, 5))) for _ in range(2000)]
    assert 0.94 < sum(abs(mean - 7.0) <= half for mean, half in found) / 2000 < 0.96


def test_noise_is_that_of_paired_differences():
    """What a seed does to all methods alike is no noise."""
    common, own = [10.0, -10.0, 0.0], {"lora": [0.0, 0.0, 0.0], "talora": [1.0, 2.0, 3.0]}
    results = [make_result(name, seed, common[seed] + own[name][seed]) for name in own for seed in range(3)]
    noise = noise_of(results, Amount(8))
    assert (noise.seeds, noise.spread, noise.shifts) == (3, pytest.approx(1.0), ())
    assert noise.size == pytest.approx(half_width(1.0, 3))
    repeated = [make_result("talora", seed, common[seed] + own["talora"][seed] + 9.0, 2) for seed in range(3)]
    assert noise_of(results, Amount(8), repeated).size == pytest.approx(9.0)
    assert noise_of([r for r in results if r.seed == 0], Amount(8)) is None
