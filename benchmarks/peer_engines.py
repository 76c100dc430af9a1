"""One engine in a process of its own: it loads the model, then does what lines of JSON on its input ask for.

    python -m benchmarks.peer_engines ENGINE FILE THREADS

Between two requests it waits in a read, so it costs the others no time. Every engine feeds the same token numbers,
chooses the best logit, and feeds that; times are of the feeding and choosing alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TextIO

Found = dict[str, Any]
CONTEXT = 2048


class Engine(ABC):
    """A loaded model. `after_torch` is when torch had been imported, for engines that need it."""

    after_torch: float | None = None

    @abstractmethod
    def __init__(self, path: Path, threads: int): ...

    @abstractmethod
    def decode(self, prompt: list[int], tokens: int) -> Found:
        """Read the prompt, then write `tokens` after the first: "seconds" for those, and the "tokens" themselves."""

    @abstractmethod
    def prefill(self, prompt: list[int]) -> Found:
        """Read the prompt up to its best next token: "seconds"."""

    @abstractmethod
    def first_token(self, text: str) -> int:
        """The first token of an answer to `text`, through the engine's own tokenizer."""


class Fewer(Engine):
    def __init__(self, path: Path, threads: int):
        from fewer.engine import threads as openmp

        openmp.prepare(threads)  # as `import fewer` and the command line do: before torch
        import torch

        self.after_torch = time.perf_counter()
        import fewer

        self.torch, self.model = torch, fewer.load(path, device="cpu", context=CONTEXT)

    def decode(self, prompt: list[int], tokens: int) -> Found:
        from fewer.evaluation.speed import read_rate, run

        answer = run(self.model, prompt, tokens + 1, stop=False)
        return {"seconds": answer.decode_seconds, "tokens": answer.tokens, "read_rate": read_rate([answer])}

    def prefill(self, prompt: list[int]) -> Found:
        start = time.perf_counter()
        int(self.model.session(1, len(prompt) + 1).prefill([prompt])[0].argmax())
        return {"seconds": time.perf_counter() - start}

    def first_token(self, text: str) -> int:
        event = next(self.model.events([self.model.encode(text, raw=True)], max_tokens=1))
        return event.tokens[0]


class LlamaCpp(Engine):
    def __init__(self, path: Path, threads: int):
        from llama_cpp import Llama

        self.model = Llama(
            str(path), n_ctx=CONTEXT, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def decode(self, prompt: list[int], tokens: int) -> Found:
        self.model.reset()
        written = [self._best(prompt)]
        start = time.perf_counter()
        for _ in range(tokens):
            written.append(self._best(written[-1:]))
        return {"seconds": time.perf_counter() - start, "tokens": written}

    def prefill(self, prompt: list[int]) -> Found:
        self.model.reset()
        start = time.perf_counter()
        self._best(prompt)
        return {"seconds": time.perf_counter() - start}

    def first_token(self, text: str) -> int:
        return self._best(self.model.tokenize(text.encode(), add_bos=False, special=True))

    def _best(self, tokens: list[int]) -> int:
        """Feed tokens; the best of the last one's logits, read where llama.cpp keeps them (no copy, no sampler)."""
        import numpy

        self.model.eval(tokens)
        logits = self.model._ctx.get_logits()
        return int(numpy.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())


class Transformers(Engine):
    """bfloat16 and eager attention; its forward pass and cache in a plain loop, which is faster than `generate`."""

    def __init__(self, path: Path, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.after_torch = time.perf_counter()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.path = torch, path
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()

    def decode(self, prompt: list[int], tokens: int) -> Found:
        with self.torch.inference_mode():
            token, cache = self._best(prompt, None)
            written = [token]
            start = time.perf_counter()
            for _ in range(tokens):
                token, cache = self._best([token], cache)
                written.append(token)
            return {"seconds": time.perf_counter() - start, "tokens": written}

    def prefill(self, prompt: list[int]) -> Found:
        with self.torch.inference_mode():
            start = time.perf_counter()
            self._best(prompt, None)
            return {"seconds": time.perf_counter() - start}

    def first_token(self, text: str) -> int:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        with self.torch.inference_mode():
            return self._best(tokenizer(text).input_ids, None)[0]

    def _best(self, tokens: list[int], cache: Any) -> tuple[int, Any]:
        output = self.model(
            self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        return int(output.logits[0, -1].argmax()), output.past_key_values


class OnlyTorch(Engine):
    """No engine: what importing torch takes, which memory is held against."""

    def __init__(self, path: Path, threads: int):
        import torch  # noqa: F401

        self.after_torch = time.perf_counter()

    def decode(self, prompt: list[int], tokens: int) -> Found:
        raise NotImplementedError("no model is loaded")

    def prefill(self, prompt: list[int]) -> Found:
        raise NotImplementedError("no model is loaded")

    def first_token(self, text: str) -> int:
        raise NotImplementedError("no model is loaded")


ENGINES: dict[str, type[Engine]] = {
    "fewer": Fewer,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "import torch": OnlyTorch,
}


def peak_bytes() -> int:
    """VmHWM: the most resident memory this process has had, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux")


def answer(engine: Engine, request: Found) -> Found:
    """One request: {"do": "decode" | "prefill" | "first token" | "peak", …}."""
    match request["do"]:
        case "decode":
            return engine.decode(request["prompt"], request["tokens"])
        case "prefill":
            return engine.prefill(request["prompt"])
        case "first token":
            token = engine.first_token(request["text"])
            since = engine.after_torch
            return {"token": token, "after_torch": None if since is None else time.perf_counter() - since}
        case "peak":
            return {"bytes": peak_bytes()}
    raise ValueError(f"unknown request {request['do']!r}")


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


def main() -> None:
    name, path, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    engine = ENGINES[name](Path(path), int(threads))
    print(json.dumps({"ready": name}), file=answers, flush=True)
    serve(engine, sys.stdin, answers)


if __name__ == "__main__":
    main()
