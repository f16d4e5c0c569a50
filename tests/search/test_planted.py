"""The search finds the best skip set there is, where there are few enough to try them all."""

import pytest

from benchmarks.planted import PlantedProblem, outcome
from search.settings import SearchSettings

# 255 skip sets.
LAYERS = 4
DEFAULT = SearchSettings().sampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[(0, False), (1, False), (0, True)], ids=["first", "second", "one MLP undone"])
def problem(request, tmp_path_factory):
    seed, undone = request.param
    return PlantedProblem(LAYERS, seed, tmp_path_factory.mktemp("reference"), undone=undone)


@pytest.fixture(scope="module")
def optimum(problem):
    return problem.optimum()


def test_the_best_skip_set_is_what_was_planted(optimum):
    assert optimum.shows_planted
    assert optimum.speedup > 1.1


@pytest.mark.parametrize(("warm", "trials"), [(True, 50), (False, 80)], ids=["warm", "cold"])
def test_the_default_sampler_finds_it_among_a_few_candidates(problem, optimum, warm, trials):
    found = problem.search(DEFAULT, warm=warm, trials=trials, seed=0)
    assert len(found) == trials
    assert outcome(found, optimum.speedup).needed is not None
    assert max(found) == pytest.approx(optimum.speedup, abs=1e-9)  # nothing is better than the best of all


def test_a_search_without_warm_starts_is_not_told_where_to_look(problem):
    cold, warm = (problem.search("tpe", warm=warm, trials=1, seed=0) for warm in (False, True))
    assert cold != warm
