"""Parts of a trial."""

import pytest

from search.objective import share_of_speedup


def test_a_prediction_for_some_texts_is_that_for_all_by_how_easy_they_are():
    plain, draft = [10.0, 10.0, 20.0, 99.0], [5.0, 10.0, 10.0]
    assert share_of_speedup(plain, draft, [0, 1, 2]) == pytest.approx(1.0)
    assert share_of_speedup(plain, draft, [0]) == pytest.approx((10 / 5) / (40 / 25))
    assert share_of_speedup(plain, draft, [1, 3]) == pytest.approx((10 / 10) / (40 / 25))  # the last was not predicted
    assert share_of_speedup(plain, draft, [3]) == 1.0
