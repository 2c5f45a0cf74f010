"""Which tokens may be drawn, how often, and on what a draw depends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.generation import Sampling
from mlra_jax.generation.sampling import _likeliest, draws, sample

compiled = jax.jit(sample, static_argnums=3)


def draw(logits_BV, num_tokens=None, key=0, step=0, **settings) -> np.ndarray:
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    num_tokens = logits_BV.shape[1] if num_tokens is None else num_tokens
    rows = draws(Sampling(**settings), key, len(logits_BV))
    return np.asarray(compiled(logits_BV, rows, step, num_tokens))


def distribution(logits_V, num_tokens, temperature, top_k=0, top_p=1.0) -> np.ndarray:
    """The probabilities that sampling should have, in float64: temperature, then k, then p."""
    x = np.asarray(logits_V, np.float64)[:num_tokens] / temperature
    if 0 < top_k < num_tokens:
        x[x < np.sort(x)[-top_k]] = -np.inf
    weights = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(weights(x)[order]) - weights(x)[order]
        x[x < x[order][before < top_p - 1e-9].min()] = -np.inf
    return np.pad(weights(x), (0, len(logits_V) - num_tokens))


COMBINATIONS = {
    "temperature": dict(temperature=0.5),
    "hot": dict(temperature=3.0),
    "top_k": dict(temperature=1.0, top_k=3),
    "top_p": dict(temperature=1.0, top_p=0.8),
    # What is likely depends on the temperature: 3 tokens, where the model's own need 4.
    "temperature_before_top_p": dict(temperature=0.5, top_p=0.85),
    "heat_before_top_p": dict(temperature=3.0, top_p=0.7),
    # The 2 likeliest of 0.4 and 0.3 are 0.57 and 0.43 of what top_k leaves: one is enough.
    "top_k_before_top_p": dict(temperature=1.0, top_k=2, top_p=0.55),
    "all_three": dict(temperature=1.5, top_k=4, top_p=0.75),
}
PROBABILITIES = np.array([0.08, 0.4, 0.05, 0.3, 0.12, 0.05])


@pytest.mark.parametrize("num_tokens", [6, 5])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_draws_follow_the_distribution(name, num_tokens):
    """Chi-square of 20,000 rows that have the same logits; padded ids would be likeliest."""
    options, rows = COMBINATIONS[name], 20_000
    logits = np.append(np.log(PROBABILITIES), 9.0)
    logits[num_tokens:] = 9.0
    want = distribution(logits, num_tokens, **options)
    found = np.bincount(draw(np.tile(logits, (rows, 1)), num_tokens, **options), minlength=7)
    assert (found > 0).tolist() == (want > 0).tolist()
    kept = want > 0
    chi_square = ((found - rows * want)[kept] ** 2 / (rows * want)[kept]).sum()
    # The 99.99 % point of at most 5 degrees of freedom; the seed is fixed, so it never flickers.
    assert chi_square < 25.7


def test_the_combinations_notice_the_order():
    logits = np.log(PROBABILITIES)
    support = lambda **options: (distribution(logits, 6, **options) > 0).sum()
    assert support(temperature=0.5, top_p=0.85) < support(temperature=1.0, top_p=0.85)
    assert support(temperature=3.0, top_p=0.7) > support(temperature=1.0, top_p=0.7)
    assert support(temperature=1.0, top_k=2, top_p=0.55) == 1
    assert support(temperature=1.0, top_p=0.55) == 2


def test_a_top_p_that_is_reached_exactly_keeps_no_more():
    # Their softmax and its sums are without rounding; what ties is beyond the boundaries.
    weights = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], np.float32)
    logits = np.log(weights)
    assert np.array_equal(jax.nn.softmax(logits), weights)
    for top_p, kept in ((0.5, 1), (0.500001, 2), (0.75, 2), (0.750001, 3), (0.875, 3)):
        drawn = draw(np.tile(logits, (4000, 1)), temperature=1.0, top_p=top_p)
        assert sorted(set(drawn.tolist())) == list(range(kept))


@pytest.mark.parametrize("top_k, kept", [(1, 1), (2, 4), (3, 4), (4, 4), (5, 5), (6, 6), (7, 6)])
def test_tokens_as_likely_as_the_last_of_top_k_all_stay(top_k, kept):
    logits = np.array([1.0, 1.0, 2.0, 1.0, 0.5, 0.0, 99.0])
    drawn = set(draw(np.tile(logits, (2000, 1)), 6, temperature=1.0, top_k=top_k).tolist())
    likeliest = [2, 0, 1, 3, 4, 5]
    assert drawn == set(likeliest[:kept])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=8, max_size=8),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1.0, 0.97, 0.61, 0.23, 0.01]),
    num_tokens=st.integers(1, 8),
)
def test_only_what_the_settings_leave_is_drawn(logits, temperature, top_k, top_p, num_tokens):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = draw(np.tile(np.float32(logits) / 2, (64, 1)), num_tokens, **options)
    if temperature == 0:
        assert set(drawn) == {int(np.argmax(logits[:num_tokens]))}
    else:
        allowed = distribution(np.array(logits) / 2, num_tokens, **options) > 0
        assert allowed[drawn].all()


def test_rows_draw_independently():
    same = np.zeros((64, 4096), np.float32)
    drawn = draw(same, temperature=1.0)
    assert len(set(drawn.tolist())) > 60
    # A row's draw depends on its own logits, its place and the key, on no other row.
    other = np.random.default_rng(0).normal(size=same.shape)
    other[5] = 0
    assert draw(other, temperature=1.0)[5] == drawn[5]
    assert draw(same[:8], temperature=1.0).tolist() == drawn[:8].tolist()
    assert (draw(same, key=1, temperature=1.0) != drawn).sum() > 60


def test_a_row_that_asks_for_nothing_keeps_everything():
    """Also tokens so unlikely that they vanish in a sum, beside rows that have top_k and top_p."""
    logits = np.array([[0.0, -40.0, -41.0, -90.0]] * 3, np.float32)
    rows = draws([Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)], 0, 3)
    kept = np.asarray(_likeliest(logits, rows, 4))
    np.testing.assert_array_equal(kept[0], logits[0])
    np.testing.assert_array_equal(np.isfinite(kept), [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])


def test_correlation_between_neighbouring_rows():
    coins = draw(np.zeros((40_000, 2)), temperature=1.0)
    assert abs(coins.mean() - 0.5) < 0.01
    for apart in (1, 2, 64):
        assert abs(np.mean(coins[apart:] == coins[:-apart]) - 0.5) < 0.01


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-0.1), "temperature=-0.1 must be at least 0"),
        (dict(temperature=float("inf")), "temperature=inf must be"),
        (dict(temperature=float("nan")), "temperature=nan must be"),
        (dict(temperature=1e39), r"must lie in \[0, inf\) \(float32 makes it inf\)"),
        (dict(temperature="warm"), "temperature='warm' is not a number"),
        (dict(top_k=-1), "top_k=-1 must be at least 0"),
        (dict(top_k=2**31), r"top_k=2147483648 must lie in \[0, 2\*\*31\)"),
        (dict(top_k=10**400), "top_k must be below"),
        (dict(top_k=2.5), "top_k=2.5 is not a whole number"),
        (dict(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"),
        (dict(top_p=1e-60), r"must lie in \(0, 1\] \(float32 makes it 0\)"),
        (dict(top_p=1.01), r"top_p=1.01 must lie in \(0, 1\]"),
    ],
)
def test_settings_outside_their_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)
    Sampling(temperature=0.0, top_k=0, top_p=1.0)


def test_numbers_of_numpy_are_numbers():
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(1)) == Sampling(0.5, 3, 1.0)
    assert Sampling(jnp.float32(0.5), jnp.int32(3), np.array(1.0)) == Sampling(0.5, 3, 1.0)


@pytest.mark.parametrize("temperature", [1e-39, 1e-45, 1e-300])
def test_a_temperature_that_float32_loses_is_greedy(temperature):
    logits = np.array([[1.0, 3.0, 2.999999, 3.0], [-2e30, -1e30, 5.0, 4.9]])
    assert Sampling(temperature).greedy and not Sampling(1.2e-38).greedy
    assert draw(logits, temperature=temperature).tolist() == [1, 2]
    assert draw(logits, temperature=temperature, top_k=2, top_p=0.5).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [2e-38, 1e-30, 1e-9])
def test_a_small_temperature_takes_the_likeliest(temperature):
    """Divided by it, all of these logits are infinite in float32."""
    logits = np.tile(np.array([50.0, 70.0, 69.0, -80.0, 90.0]), (64, 1))
    assert set(draw(logits, 4, temperature=temperature).tolist()) == {1}
    assert set(draw(-logits, 4, temperature=temperature, top_k=3).tolist()) == {3}


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "1", [0, -1]])
def test_seeds_outside_their_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number in \[0, 2\*\*32\)"):
        draws(Sampling(1.0), seed, 2)


@pytest.mark.parametrize(
    ("sampling", "random"),
    [
        (Sampling(), False),
        (Sampling(temperature=1e-39, top_k=2), False),
        ([Sampling(), Sampling(temperature=0.5)], True),
    ],
)
def test_random_numbers_are_made_for_rows_that_draw(sampling, random):
    made = jax.make_jaxpr(lambda x, rows: sample(x, rows, 0, 6))(
        jnp.zeros((2, 7)), draws(sampling, 0, 2)
    )
    assert ("random_bits" in str(made)) == random
