"""`fewer generate`: one answer, streamed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewer.cli import options as o
from fewer.cli.drafts import DraftPainter
from fewer.cli.loading import choose_recipe, load_model, prepare
from fewer.cli.output import note, print_json, print_table, size, table
from fewer.errors import UsageError

if TYPE_CHECKING:
    from fewer.language_model import Generation, LanguageModel


def generate(
    prompt: o.Prompt,
    model: o.Model = o.MODEL_DEFAULT,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model continues the text.")] = False,
    max_tokens: o.MaxTokens = 256,
    stop: o.Stop = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Also give each token's log-probability.")] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour what the decoding method guessed and the model accepted.")
    ] = False,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = None,
    weights: o.Weights = None,
    cache: o.Cache = None,
    decoding: o.Decoding = None,
    experts: o.Experts = None,
    recipe: o.RecipeFile = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Answer PROMPT as one user message; greedy unless a temperature is given."""
    prepare(threads)
    from fewer.decoding.sampling import SamplingConfig
    from fewer.language_model import Generation

    chosen = choose_recipe(weights, cache, decoding, experts, dtype, recipe)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty: give some text")
    loaded = load_model(model, chosen, device, context)
    result = Generation()
    painter = None if json or not show_drafts else DraftPainter(loaded, result)
    for piece in loaded.stream(text, raw, max_tokens, sampling, stop or (), result, logprobs):
        if painter is not None:
            painter.show()
        elif not json:
            print(piece, end="", flush=True)
    if json:
        print_json(figures(loaded, result))
        return
    print()
    if painter is not None:
        note(painter.legend())
    if logprobs:
        rows = [
            (repr(loaded.tokenizer.decode([token], skip_special=False)), str(token), f"{score:.4f}")
            for token, score in zip(result.tokens, result.logprobs or [], strict=True)
        ]
        print_table(table(("token", "id", "log-probability"), rows, right=("id", "log-probability")))
    note(summary(loaded, result))


def figures(model: LanguageModel, result: Generation) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "text": result.text,
        "tokens": len(result.tokens),
        "token_ids": result.tokens,
        "logprobs": result.logprobs,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "prefill_seconds": result.prefill_seconds,
        "tokens_per_pass": result.tokens_per_pass,
        "drafts": result.counts.to_json() if result.counts.drafted else None,
        "load_seconds": model.load_seconds,
        "kv_bytes": result.kv_bytes,
        "weight_bytes": model.weight_bytes,
        "recipe": str(model.recipe),
        "device": str(model.transformer.device),
    }


def summary(model: LanguageModel, result: Generation) -> str:
    """One line under the answer."""
    per_pass = f" · {result.tokens_per_pass:.2f} tokens a pass" if result.tokens_per_pass > 1.005 else ""
    return (
        f"{len(result.tokens)} tokens at {result.decode_tokens_per_second:.0f}/s{per_pass} · prompt of "
        f"{result.prompt_tokens} at {result.prefill_tokens_per_second:.0f}/s · loaded in {model.load_seconds:.2f} s · "
        f"weights {size(model.weight_bytes)}, keys and values {size(result.kv_bytes)} · {model.recipe}"
    )
