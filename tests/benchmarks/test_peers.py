"""An engine's process answers requests in order, writes what the engine writes, and sleeps in between."""

from __future__ import annotations

from pathlib import Path

import fewer
from benchmarks.peers import IDLE_SHARE, Readings, Worker, _ratios, common_prefix, idle_shares
from tests.tiny_model import write_model


def test_a_worker_writes_the_models_tokens_and_waits_without_spinning(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    model = fewer.load(folder, device="cpu")
    prompt = model.encode("the cat", raw=True)
    expected = [token for event in model.events([prompt], max_tokens=1) for token in event.tokens]
    worker = Worker("fewer", folder, 1)
    try:
        found = worker.ask("decode", prompt=prompt, tokens=6)
        assert len(found["tokens"]) == 7 and found["tokens"][0] == expected[0] and found["seconds"] > 0
        assert worker.ask("decode", prompt=prompt, tokens=6)["tokens"] == found["tokens"]
        assert worker.ask("prefill", prompt=prompt)["seconds"] > 0
        assert worker.ask("first token", text="the cat")["token"] == expected[0]
        assert worker.ask("peak")["bytes"] > 50e6
        assert idle_shares([worker], 0.5)["fewer"] <= IDLE_SHARE
    finally:
        worker.close()
    assert worker.process.returncode == 0


def test_ratios_are_taken_within_a_round() -> None:
    ours = Readings(decode=[100.0, 50.0, 20.0], prefill=[10.0], first_token_seconds=[2.0])
    theirs = Readings(decode=[50.0, 20.0, 10.0], prefill=[20.0], first_token_seconds=[3.0])
    found = _ratios(ours, theirs)
    assert found["decode"] == {"median": 2.0, "low": 2.0, "high": 2.5}
    assert found["prefill"]["median"] == 0.5 and found["first_token"]["median"] == 1.5 and "busy_decode" not in found


def test_a_common_prefix_ends_where_texts_differ() -> None:
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 4], [9], [1, 2, 3, 4], [])] == [2, 0, 3, 0]
