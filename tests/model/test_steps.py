"""What a `Step` may ask of the network beside the next token: masks, embeddings, taps, layer plans, ragged batches.

Each is held against transformers in float64, with the mask or the hook that says the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.language_model import LanguageModel, load
from fewer.model.norm import rms_norm
from fewer.model.step import Output, Step
from tests.model.families import reference_logits, tiny_models, write_tiny_model
from tests.random_model import random_tokens

TOKENS = random_tokens(40, seed=3, vocab_size=96)  # more than a window
NAMES = ("llama3", "gemma3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LanguageModel, Any]]:
    """(ours in float32, theirs in float64) by family."""
    loaded = {}
    for name in (*NAMES, "qwen2-moe", "olmo2"):
        folder = tmp_path_factory.mktemp(name)
        theirs = write_tiny_model(name, folder)
        loaded[name] = load(folder, weights="dense", dtype="float32", device="cpu"), theirs.double()
    return loaded


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours.double() - theirs).abs().max() / (theirs.max() - theirs.min()))
    assert difference <= 1e-4, f"they differ by {difference:.2e} of their range"


def step_of(tokens: list[int], **settings: Any) -> Step:
    return Step(torch.tensor([tokens]), torch.arange(len(tokens))[None], logits="all", **settings)


def run(model: LanguageModel, step: Step) -> Output:
    return model.runner.step(step, model.session().cache)


def layer_masks(model: Any, visible: Tensor) -> Any:
    """What transformers takes for a mask of ours [T, T]: additive, and by layer type where it has such."""
    hidden = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    if getattr(model.config, "sliding_window", None) is None:
        return hidden[None, None]
    query, key = torch.arange(len(visible))[:, None], torch.arange(len(visible))
    too_old = query - key >= model.config.sliding_window
    windowed = hidden.masked_fill(too_old, torch.finfo(torch.float64).min)
    return {"full_attention": hidden[None, None], "sliding_attention": windowed[None, None]}


def masked_logits(model: Any, visible: Tensor) -> Tensor:
    """[T, V] float64 with a mask [T, T] of what each token sees."""
    with torch.no_grad():
        logits: Tensor = model(
            torch.tensor([TOKENS]), attention_mask=layer_masks(model, visible), use_cache=False
        ).logits[0]
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_a_bidirectional_step_sees_the_tokens_behind_it(name: str, models: dict[str, Any]) -> None:
    ours, theirs = models[name]
    logits = run(ours, step_of(TOKENS, mask="bidirectional")).logits
    everything = torch.ones(len(TOKENS), len(TOKENS), dtype=torch.bool)
    assert_close(logits[0], masked_logits(theirs, everything))


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_step_sees_its_ancestors(name: str, models: dict[str, Any]) -> None:
    ours, theirs = models[name]
    count = len(TOKENS)
    generator = torch.Generator().manual_seed(5)
    parents = [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, count)]
    visible, depth = torch.eye(count, dtype=torch.bool), [0] * count
    for node in range(1, count):
        visible[node] |= visible[parents[node]]
        depth[node] = depth[parents[node]] + 1
    positions = torch.tensor([depth])
    step = Step(torch.tensor([TOKENS]), positions, mask="tree", ancestors=visible[None], logits="all")
    masks = layer_masks(theirs, visible)
    if isinstance(masks, dict):
        assert max(depth) < theirs.config.sliding_window  # so that no window cuts the tree
        masks["sliding_attention"] = masks["full_attention"]
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]), position_ids=positions, attention_mask=masks, use_cache=False).logits[
            0
        ]
    assert_close(run(ours, step).logits[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_soft_tokens_equal_inputs_embeds(name: str, models: dict[str, Any]) -> None:
    ours, theirs = models[name]
    soft = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(inputs_embeds=soft[None].double(), use_cache=False).logits[0, -1]
    assert_close(ours.session().prefill_embeddings([soft])[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_of_tokens_equal_the_tokens(name: str, models: dict[str, Any]) -> None:
    ours, _ = models[name]
    rows = ours.transformer.embed.rows(torch.tensor(TOKENS)) * (ours.config.embedding_scale or 1.0)
    session, plain = ours.session(), ours.session()
    assert torch.equal(session.prefill_embeddings([rows]), plain.prefill([TOKENS]))
    assert torch.equal(session.decode([7]), plain.decode([7]))  # the cache holds the same too


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_the_hidden_states_of_transformers(name: str, models: dict[str, Any]) -> None:
    ours, theirs = models[name]
    layers = ours.config.layers
    output = run(ours, step_of(TOKENS, taps=range(layers + 1)))
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False).hidden_states
    assert list(output.taps) == list(range(layers + 1))
    for layer in range(layers):
        assert_close(output.taps[layer], expected[layer])
    # transformers gives the last one after the final norm
    last = rms_norm(output.taps[layers], ours.transformer.norm, ours.config.norm_eps, torch.float32)
    assert_close(last, expected[layers])
    assert_close(output.hidden, expected[layers])


def test_only_the_taps_asked_for_are_returned(models: dict[str, Any]) -> None:
    ours, _ = models["llama3"]
    output = run(ours, step_of(TOKENS, taps=(2,)))
    assert list(output.taps) == [2]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_every_layer_equals_none(name: str, models: dict[str, Any]) -> None:
    ours, _ = models[name]
    whole = torch.ones(1, len(TOKENS), ours.config.layers, dtype=torch.bool)
    plain = run(ours, step_of(TOKENS)).logits
    assert_close(run(ours, step_of(TOKENS, layer_plan=whole)).logits, plain.double())


@pytest.mark.parametrize(("name", "layer"), [("llama3", 1), ("gemma3", 5), ("gemma3", 2)])
def test_a_skipped_layer_equals_a_model_without_it(name: str, layer: int, models: dict[str, Any]) -> None:
    ours, _ = models[name]
    plan = torch.ones(1, len(TOKENS), ours.config.layers, dtype=torch.bool)
    plan[:, :, layer] = False
    config, shorter = tiny_models(name)
    del shorter.model.layers[layer]
    config.num_hidden_layers -= 1
    if hasattr(config, "layer_types"):
        del config.layer_types[layer]
    assert_close(run(ours, step_of(TOKENS, layer_plan=plan)).logits[0], reference_logits(shorter, [TOKENS])[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_skips_a_layer_is_not_seen_there(name: str, models: dict[str, Any]) -> None:
    """A plan for each token, then a decoded one that runs every layer and must not see the gaps."""
    ours, theirs = models[name]
    plan = torch.rand(1, len(TOKENS), ours.config.layers, generator=torch.Generator().manual_seed(4)) < 0.7
    plan[:, -1] = True
    session = ours.session()
    first = Step(
        torch.tensor([TOKENS[:-1]]), torch.arange(len(TOKENS) - 1)[None], logits="all", layer_plan=plan[:, :-1]
    )
    logits = session.runner.step(first, session.cache).logits
    session.cache.commit([len(TOKENS) - 1])
    both = torch.cat((logits[0], session.decode([TOKENS[-1]])))
    assert_close(both, planned_logits(theirs, plan[0]))


def planned_logits(model: Any, plan: Tensor) -> Tensor:
    """[T, V] float64 of a plan [T, L], by hooks: a layer's mask hides the tokens that skip it, and they pass by it."""
    hooks = []
    hide = torch.finfo(torch.float64).min

    def mask(module: Any, arguments: Any, keywords: dict[str, Any], runs: Tensor) -> Any:
        return arguments, keywords | {"attention_mask": keywords["attention_mask"].masked_fill(~runs, hide)}

    def pass_by(module: Any, arguments: Any, output: Tensor, runs: Tensor) -> Tensor:
        return torch.where(runs[:, None], output, arguments[0])

    for index, layer in enumerate(model.model.layers):
        runs = plan[:, index]
        hooks += [
            layer.register_forward_pre_hook(lambda *given, runs=runs: mask(*given, runs), with_kwargs=True),
            layer.register_forward_hook(lambda *given, runs=runs: pass_by(*given, runs)),
        ]
    try:
        return masked_logits(model, torch.ones(len(plan), len(plan), dtype=torch.bool).tril())
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2-moe", "olmo2"])
def test_a_ragged_batch_equals_single_runs(name: str, models: dict[str, Any]) -> None:
    ours, _ = models[name]
    prompts = [TOKENS, TOKENS[:7], TOKENS[3:24]]
    answers = [random_tokens(12, seed=row, vocab_size=96) for row in range(3)]
    single = []
    for prompt, answer in zip(prompts, answers, strict=True):
        session = ours.session()
        single.append([session.prefill([prompt])[0], *(session.decode([token])[0] for token in answer)])
    session = ours.session(3)
    batch = [session.prefill(prompts)]
    for step in range(12):  # the second row pauses halfway and goes on
        active = [True, step < 6, True]
        logits = session.decode([answer[step] for answer in answers], active)
        batch.append(logits)
    for step, logits in enumerate(batch):
        for row in range(3):
            if row != 1 or step <= 6:
                assert_close(logits[row], single[row][step].double())
    assert session.lengths == [52, 13, 33]
    resumed = session.decode([0, answers[1][6], 0], [False, True, False])
    assert_close(resumed[1], single[1][7].double())
