"""The committed table of plans: it fits, it is whole, and the search beats the hand.

`tests/test_tpu_compile.py` compiles two of its rows.
"""

import importlib.util

import pytest

from benchmarks.plan import BY_HAND, RESULTS, chips_of, keys, markdown, models, of_row
from mlra_jax.plan import planning, topology
from mlra_jax.plan.chips import CHIPS
from tests.plan.table import ROWS


def test_the_table_is_whole_and_its_rows_are_of_their_slices():
    assert [set(ROWS), len(ROWS)] == [set(keys()), len(set(keys()))]
    for row in ROWS.values():
        ways = 1
        for n in row.get("mesh", {}).values():
            ways *= n
        assert not row["fits"] or ways == chips_of(row)


def test_the_page_has_the_tables():
    page = (RESULTS.parents[2] / "docs/plan.md").read_text()
    assert "\n".join(markdown(ROWS.values())) in page
    assert "\n".join(models(ROWS)) in page


def test_every_row_fits_its_chip():
    fitting = [row for row in ROWS.values() if row["fits"]]
    for row in fitting:
        chip = CHIPS[row["topology"].partition(":")[0]]
        assert sum(row["memory"].values()) <= chip.memory, row["topology"]
    refused = {key[:3] for key, row in ROWS.items() if not row["fits"]}
    assert refused <= {("v5e:2x2", 1, 32768)} and len(fitting) >= 30


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install libtpu)",
)
def test_the_formulas_are_near_the_compiler():
    rows = [row for row in ROWS.values() if row["by"] == "compiler" and "remat" in row]
    assert len(rows) >= 7
    for row in rows:
        where = topology.describe(row["topology"], row["slices"])
        estimate = planning.estimated(of_row(row), where)
        needed = sum(row["memory"].values())
        assert 0.9 * needed < estimate.memory.bytes < 1.5 * needed, row
        assert estimate.times.matrix == pytest.approx(row["times"]["matrix"], rel=1e-3)
        for resource in ("links", "network"):
            compiled, by_formula = row["times"][resource], getattr(estimate.times, resource)
            assert 0.8 * compiled <= by_formula <= 2.1 * compiled, row


@pytest.mark.parametrize("key", BY_HAND)
def test_the_search_is_no_slower_than_the_hand(key):
    found, hand = ROWS[*key, None, None, None], ROWS[*key, None, True, None]
    assert found["by"] == hand["by"] == "compiler"
    assert found["tokens_per_second"] >= hand["tokens_per_second"]
    assert sum(found["times"].values()) <= sum(hand["times"].values())
