"""Bad input ends in one sentence that names the fault, the value and what is allowed; nothing is left half written."""

from __future__ import annotations

import json
import pickle
import resource
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Fewer, start
from tests.tiny_model import write_model


def refuse(fewer: Fewer, *words: str, stdin: str = "") -> tuple[int, str]:
    """Exit code and the sentence."""
    result = fewer(*words, stdin=stdin)
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    return result.exit_code, result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["", "-m", "TINY"], 2, ["prompt is empty"]),
        (["  \n", "-m", "TINY"], 2, ["prompt is empty"]),
        (["x", "-m", ""], 2, ["name is empty", "smollm2"]),
        (["x", "-m", "none.gguf"], 1, ["none.gguf does not exist", "smollm2"]),
        (["x", "-m", "/no/such/folder"], 1, ["/no/such/folder does not exist"]),
        (["x", "-m", "smolm"], 1, ["'smolm'", "hub id", "smollm2"]),
        (["x", "-m", "TINY", "-n", "0"], 2, ["--max-tokens is 0", "from 1"]),
        (["x", "-m", "TINY", "-n", "-1"], 2, ["--max-tokens is -1", "from 1"]),
        (["x", "-m", "TINY", "--context", "-5"], 2, ["--context is -5"]),
        (["x", "-m", "TINY", "--temperature", "hot"], 2, ["--temperature", "'hot'", "number"]),
        (["x", "-m", "TINY", "--temperature", "-1"], 2, ["temperature is -1.0", "0 (greedy)"]),
        (["x", "-m", "TINY", "--top-p", "1.5"], 2, ["top_p is 1.5", "at most 1"]),
        (["x", "-m", "TINY", "--seed", "-3"], 2, ["seed is -3", "from 0"]),
        (["x", "-m", "TINY", "--dtype", "float8"], 2, ["'float8'", "float32, bfloat16, float16"]),
        (["x", "-m", "TINY", "--device", "tpu"], 2, ["'tpu'", "cpu, cuda"]),
        (["x", "-m", "TINY", "-w", "int5"], 2, ["'int5'", "auto, dense, int4, int8"]),
        (["x", "-m", "TINY", "-w", "int4:group=48"], 2, ["group=48", "32, 64, 128"]),
        (["x", "-m", "TINY", "-w", "int4:grup=32"], 2, ["'grup'", "group, head", "did you mean 'group'"]),
        (["x", "-m", "TINY", "-w", "int4:group=128"], 2, ["128", "64"]),
        (["x", "-m", "TINY", "--cache", "sink-window:window=0"], 2, ["window=0", "1 or more"]),
        (["x", "-m", "TINY", "--decoding", "draft-model"], 2, ["no model is named", "draft-model:model=NAME"]),
        (["x", "-m", "TINY", "--recipe", "none.yaml"], 2, ["none.yaml", "No such file"]),
        (["a " * 400, "-m", "TINY"], 2, ["context holds 256", "shorten the prompt"]),
        (["a " * 30, "-m", "TINY", "--raw", "--context", "16"], 2, ["context holds 16", "shorten the prompt"]),
    ],
)
def test_a_wrong_request_names_the_value_and_what_is_allowed(
    fewer: Fewer, tiny: str, words: list[str], code: int, parts: list[str]
) -> None:
    found, sentence = refuse(fewer, "generate", *(tiny if word == "TINY" else word for word in words))
    assert found == code
    assert all(part in sentence for part in parts), sentence


def test_an_empty_stdin_is_an_empty_prompt(fewer: Fewer, tiny: str) -> None:
    assert refuse(fewer, "generate", "-", "-m", tiny, stdin=" \n") == (2, "the prompt is empty: give some text")


def test_pickle_checkpoints_are_refused_and_never_unpickled(fewer: Fewer, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    code, sentence = refuse(fewer, "inspect", str(tmp_path / "pytorch_model.bin"))
    assert code == 1 and "pickle" in sentence and "safetensors or GGUF" in sentence
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_model_are_refused(fewer: Fewer, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model at all, whatever its name says")
    (tmp_path / "part.safetensors").write_bytes(b"\0" * 64)
    (tmp_path / "empty").mkdir()
    assert "text.gguf" in refuse(fewer, "generate", "x", "-m", str(tmp_path / "text.gguf"))[1]
    assert "give its folder" in refuse(fewer, "inspect", str(tmp_path / "part.safetensors"))[1]
    assert "no config.json and no .gguf" in refuse(fewer, "inspect", str(tmp_path / "empty"))[1]


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("fewer.json", "{", "is damaged"),
        ("fewer.json", "[]", "is damaged"),
        ("fewer.json", '{"version": 99}', "layout version 99, this fewer reads 1"),
        ("model.safetensors", "short", "model.safetensors"),
        ("tokenizer.json", "{}", "tokenizer.json"),
    ],
)
def test_a_damaged_folder_of_ours_is_named(fewer: Fewer, tmp_path: Path, file: str, content: str, part: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / file).write_text(content)
    code, sentence = refuse(fewer, "generate", "x", "-m", str(folder))
    assert code == 1 and part in sentence


def test_a_folder_whose_description_contradicts_its_tensors_is_named(fewer: Fewer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    description = json.loads((folder / "fewer.json").read_text())
    description["config"]["layers"] = 3
    (folder / "fewer.json").write_text(json.dumps(description))
    assert "layers.2" in refuse(fewer, "generate", "x", "-m", str(folder))[1]
    description["config"].update(layers=2, hidden_size=32)
    (folder / "fewer.json").write_text(json.dumps(description))
    code, sentence = refuse(fewer, "generate", "x", "-m", str(folder))
    assert code == 1 and "embed.weight" in sentence and "64" in sentence and "32" in sentence


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
        ("{{ messages.__class__.__mro__ }}", "outside its sandbox"),
        (
            "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
            "value of",
        ),
        ("{% for m in messages %}", "mistake in line 1"),
        ("{{ raise_exception('only with a system message') }}", "only with a system message"),
        (None, "no chat template: use --raw"),
    ],
)
def test_a_hostile_chat_template_ends_in_a_sentence(fewer: Fewer, tmp_path: Path, template: str, part: str) -> None:
    folder = write_model(tmp_path / "model", chat_template=template)
    assert part in refuse(fewer, "generate", "x", "-m", str(folder))[1]
    assert fewer("generate", "x", "-m", str(folder), "--raw", "-n", "1").exit_code == 0


def test_a_draft_of_another_vocabulary_is_refused(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(described))
    words = ("generate", "x", "-m", tiny, "--decoding", f"draft-model:model={other}")
    code, sentence = refuse(fewer, *words)
    assert code == 2 and "another vocabulary" in sentence


def test_a_cache_that_outgrows_the_context_is_allowed_where_it_renumbers(fewer: Fewer, tiny: str) -> None:
    words = ("generate", "a " * 40, "-m", tiny, "--raw", "--context", "32", "-n", "4", "--cache")
    assert "context holds 32" in refuse(fewer, *words, "sink-window:window=8")[1]
    assert fewer(*words, "sink-window:window=8,renumber=true").exit_code == 0


def test_a_full_disk_leaves_no_folder_behind(tiny: str, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit then fails with an OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start("compress", "-m", tiny, "-o", str(tmp_path / "small"), "-w", "dense", preexec_fn=limit)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == ""
    assert errors.startswith(f"error: cannot write {tmp_path / 'small'}") and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, sentence = refuse(fewer, "compress", "-m", tiny, "-o", str(tmp_path / "file" / "small"))
    assert code == 1 and "cannot write" in sentence and "Not a directory" in sentence
