"""The report's statistics against closed forms, slow loops, simulation and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import integrate
from scipy import stats as scipy_stats

from projected_grpo.report import stats
from projected_grpo.report.compare import envelope


def test_the_t_interval_is_the_one_on_paper():
    # Five paired drops 10, 20, 30, 40, 50: mean 30, SD sqrt(250) = 15.8114, t(0.975, 4) = 2.77645.
    low, high = stats.t_interval([10, 20, 30, 40, 50])
    assert (low, high) == pytest.approx((30 - 19.6324, 30 + 19.6324), abs=1e-3)
    assert stats.standard_error([10, 20, 30, 40, 50]) == pytest.approx(math.sqrt(50))
    values = [0.71, 0.74, 0.69, 0.75]
    expected = scipy_stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert stats.t_interval(values) == pytest.approx(expected)
    assert stats.t_interval([0.3]) is stats.t_interval([]) is stats.standard_error([0.3]) is None
    assert stats.t_interval([0.3, 0.3]) == (0.3, 0.3)


def test_the_sign_test_is_exact_and_leaves_ties_out():
    assert stats.sign_test([1, 1, 1, 1, 1]) == pytest.approx(2 / 32)
    assert stats.sign_test([1, 1, 1, 1, -1]) == pytest.approx(2 * 6 / 32)
    assert stats.sign_test([1, 1, 1, 0, 0]) == pytest.approx(2 / 8)
    assert stats.sign_test([1, -1]) == 1
    assert stats.sign_test([0.0, 0.0]) == 1  # or Holm would count one comparison less than there is
    assert stats.sign_test([]) is None


def test_the_t_test_is_silent_where_there_is_no_spread():
    assert stats.t_test([10, 20, 30, 40, 50]) == pytest.approx(2 * scipy_stats.t.sf(30 / math.sqrt(50), 4))
    assert stats.t_test([0.3, 0.3, 0.3]) is stats.t_test([0.3]) is None


def test_holm_by_hand():
    # Sorted: 0.005 x 4 = 0.02; 0.01 x 3 = 0.03; 0.03 x 2 = 0.06; 0.04 x 1 is less than what came before it, so 0.06.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9, None]) == [1.0, 1.0, None]
    assert stats.holm([0.04]) == [0.04]
    assert stats.holm([None, None]) == [None, None]


def counts(generator, n_problems, first, second, problems=None, samples=8):
    """One seed's pair, with problems of their own difficulty, shared by both members."""
    shift = generator.normal(0, 0.1, (n_problems, 1))
    hits = [generator.binomial(samples, np.clip(rate + shift, 0, 1)).astype(float) for rate in (first, second)]
    names = tuple(f"p{i}" for i in range(n_problems)) if problems is None else problems
    n = np.full((n_problems, 1), float(samples))
    return stats.PairCounts(names, n_problems, hits[0], n, hits[1], n)


def slow_bootstrap(pairs, crossed, draws, seed):
    """The same resampling in plain loops."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        shared = generator.integers(len(pairs[0].problems), size=len(pairs[0].problems))
        differences = []
        for which in generator.integers(len(pairs), size=len(pairs)):
            pair = pairs[which]
            drawn = shared if crossed else generator.integers(len(pair.problems), size=len(pair.problems))
            rates = [
                sum(hits[i, 0] for i in drawn) / sum(n[i, 0] for i in drawn)
                for hits, n in ((pair.first_hits, pair.first_n), (pair.second_hits, pair.second_n))
            ]
            differences.append(rates[0] - rates[1])
        means.append(sum(differences) / len(differences))
    return np.array(means)


@pytest.mark.parametrize("crossed", [True, False])
def test_the_bootstrap_draws_as_the_slow_loops_do(crossed):
    generator = np.random.default_rng(1)
    rates = [(0.3, 0.8), (0.5, 0.7), (0.35, 0.75), (0.2, 0.7)]
    pairs = [
        counts(generator, 15, first, second, problems=None if crossed else tuple(f"s{seed}p{i}" for i in range(15)))
        for seed, (first, second) in enumerate(rates)
    ]
    fast = stats.paired_bootstrap(pairs, np.random.default_rng(2), draws=8000)[:, 0]
    slow = slow_bootstrap(pairs, crossed, 4000, 3)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.006)
    assert fast.std() == pytest.approx(slow.std(), rel=0.08)
    assert stats.percentile_interval(fast) == pytest.approx(stats.percentile_interval(slow), abs=0.012)


def test_the_bootstrap_is_seeded_and_pairs_its_members():
    pairs = [counts(np.random.default_rng(i), 10, 0.5, 0.5) for i in range(3)]
    same = [stats.PairCounts(p.problems, 10, p.first_hits, p.first_n, p.first_hits, p.first_n) for p in pairs]
    again = [stats.paired_bootstrap(pairs, np.random.default_rng(7), draws=50) for _ in range(2)]
    assert (again[0] == again[1]).all()
    # Two members with the same hits differ in no draw: both see the same problems.
    assert (stats.paired_bootstrap(same, np.random.default_rng(7), draws=50) == 0).all()


def test_a_draw_without_completions_of_a_mode_is_no_zero():
    hits, n = np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]])
    pair = stats.PairCounts(("a", "b"), 2, hits, n, 0 * hits, n)
    drawn = stats.paired_bootstrap([pair, pair], np.random.default_rng(0), draws=200)
    assert np.isnan(drawn).any()
    assert stats.percentile_interval(drawn[:, 0]) == (1.0, 1.0)
    assert stats.percentile_interval(np.array([np.nan])) is None


def test_coverage_of_the_intervals_on_simulated_seeds():
    """With 8 seeds the bootstrap is somewhat too narrow, t holds its level, and the wider of both more than that."""
    generator = np.random.default_rng(11)
    hits = {"bootstrap": 0, "t": 0, "wider": 0}
    runs = 250
    for _ in range(runs):
        pairs = []
        for seed in range(8):
            names = tuple(f"s{seed}p{i}" for i in range(20))
            pairs.append(counts(generator, 20, 0.4 + generator.normal(0, 0.06), 0.7, problems=names))
        differences = [float(p.difference(np.ones((1, 20)))[0, 0]) for p in pairs]
        found = {"t": stats.t_interval(differences)}
        found["bootstrap"] = stats.percentile_interval(stats.paired_bootstrap(pairs, generator, draws=300)[:, 0])
        found["wider"] = envelope(found["t"], found["bootstrap"])
        for name, (low, high) in found.items():
            hits[name] += low <= -0.3 <= high
    shares = {name: count / runs for name, count in hits.items()}
    assert 0.84 <= shares["bootstrap"] <= 0.99
    assert 0.91 <= shares["t"] <= 0.99
    assert shares["wider"] >= max(shares["t"], shares["bootstrap"])


@pytest.mark.parametrize(
    ("drop", "sd", "n", "alpha"), [(0.3, 0.25, 6, 0.05), (0.15, 0.2, 12, 0.0125), (0.1, 0.2, 5, 0.05)]
)
def test_power_against_simulation(drop, sd, n, alpha):
    samples = np.random.default_rng(5).normal(drop, sd, (20_000, n))
    rejected = scipy_stats.ttest_1samp(samples, 0.0, axis=1).pvalue < alpha
    assert stats.power(drop, sd, n, alpha) == pytest.approx(rejected.mean(), abs=0.012)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("ratio", [0.5, 2, 6, 9, 12, 25])
def test_power_stays_right_far_out_where_the_noncentral_t_is_hard(n, ratio):
    critical, df, shift = scipy_stats.t.ppf(0.975, n - 1), n - 1, ratio * math.sqrt(n)

    def density(s):
        tails = scipy_stats.norm.cdf(shift - critical * s) + scipy_stats.norm.cdf(-shift - critical * s)
        return tails * scipy_stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)

    exact = integrate.quad(density, 0, 10, limit=400, points=[0.1, 0.5, 1, 2])[0]
    assert stats.power(ratio, 1.0, n) == pytest.approx(exact, abs=1e-6)


def test_the_number_of_seeds_is_the_smallest_that_does():
    for drop, sd, alpha in ((0.3, 0.2, 0.05), (0.15, 0.2, 0.05), (0.15, 0.2, 0.05 / 6)):
        n = stats.seeds_needed(drop, sd, alpha)
        assert stats.power(drop, sd, n, alpha) >= 0.8 > stats.power(drop, sd, n - 1, alpha)
    # A standard table: effect size 1, two-sided 0.05, power 0.8 takes 10 pairs.
    assert stats.seeds_needed(0.2, 0.2) == 10
    assert stats.seeds_needed(0.3, 0.0) == 2
    assert stats.seeds_needed(0.001, 1.0) is None


def test_the_interval_of_an_sd():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        low, high = stats.sd_interval(float(np.std(generator.normal(0, 1, 5), ddof=1)), 5)
        inside += low <= 1 <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)
    assert stats.sd_interval(0.1, 1) is None
