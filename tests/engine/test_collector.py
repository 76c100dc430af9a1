"""The collector waits inside a pause and is afterwards what it was before, also when the work fails."""

from __future__ import annotations

import gc

import pytest

from fewer.engine.collector import CollectorPause


def test_the_collector_waits_and_comes_back() -> None:
    assert gc.isenabled()
    with CollectorPause():
        with CollectorPause():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_comes_back_after_a_fault() -> None:
    with pytest.raises(KeyError), CollectorPause():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with CollectorPause():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
