"""The committed table of plans: it fits, it is whole, and the search beats the hand.

`tests/test_tpu_compile.py` compiles two of its rows.
"""

import pytest

from benchmarks.plan import BY_HAND, chips_of, keys, markdown
from mlra_jax.plan.chips import CHIPS
from tests.plan.table import ROWS


def test_the_table_is_whole_and_its_rows_are_of_their_slices():
    assert [set(ROWS), len(ROWS)] == [set(keys()), len(set(keys()))]
    for row in ROWS.values():
        ways = 1
        for n in row.get("mesh", {}).values():
            ways *= n
        assert not row["fits"] or ways == chips_of(row)
    assert len(list(markdown(ROWS.values()))) == len(ROWS) + 2


def test_every_row_fits_its_chip():
    fitting = [row for row in ROWS.values() if row["fits"]]
    for row in fitting:
        chip = CHIPS[row["topology"].partition(":")[0]]
        assert sum(row["memory"].values()) <= chip.memory, row["topology"]
    refused = [key for key, row in ROWS.items() if not row["fits"]]
    assert len(refused) <= 1 and len(fitting) >= 30


@pytest.mark.parametrize("key", BY_HAND)
def test_the_search_is_no_slower_than_the_hand(key):
    found, hand = ROWS[*key, None, None], ROWS[*key, None, True]
    assert found["by"] == hand["by"] == "compiler"
    assert found["tokens_per_second"] >= hand["tokens_per_second"]
    assert sum(found["times"].values()) <= sum(hand["times"].values())
