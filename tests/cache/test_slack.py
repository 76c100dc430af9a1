"""What a cache can take back, and which drafts that allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fewer import registry
from fewer.cache import FullCache, SinkWindowCache
from fewer.cache.slot_map import SLACK
from fewer.errors import UsageError
from fewer.recipe import Recipe
from fewer.registry import method
from tests.random_model import CONFIG, config_of, new_session, random_transformer


@pytest.fixture
def cache_with_slack(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a registered cache with a slack of its own."""

    class Short(FullCache):
        slack = request.param

    method("short", slot="cache", lossless=True)(Short)
    yield "short"
    del registry._METHODS["cache", "short"]


@pytest.mark.parametrize("cache_with_slack", [4], indirect=True)
def test_a_recipe_whose_drafts_are_longer_than_the_slack_is_refused(cache_with_slack: str) -> None:
    message = "guesses up to 10 tokens a round, but cache=short can take back 4: use decoding=prompt-lookup:tokens=4"
    with pytest.raises(UsageError, match=message):
        Recipe(cache=cache_with_slack, decoding="prompt-lookup")
    Recipe(cache=cache_with_slack, decoding="prompt-lookup:tokens=4")
    Recipe(cache=cache_with_slack)


@pytest.mark.parametrize("cache_with_slack", [0], indirect=True)
def test_a_cache_that_takes_nothing_back_allows_plain_decoding_only(cache_with_slack: str) -> None:
    with pytest.raises(UsageError, match="can take back none: use decoding=plain or cache=full"):
        Recipe(cache=cache_with_slack, decoding="prompt-lookup:tokens=1")
    Recipe(cache=cache_with_slack)


def test_a_cache_without_windows_takes_back_everything() -> None:
    assert new_session(random_transformer(CONFIG)).cache.slack is None
    assert new_session(random_transformer(config_of(sliding_window=9))).cache.slack == SLACK
    assert new_session(random_transformer(CONFIG), 1, SinkWindowCache).cache.slack == SLACK
