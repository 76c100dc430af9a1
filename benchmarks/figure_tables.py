"""What the generated blocks of the pages say: markdown from the registrations and from measured JSON files.

A figure that was not measured is said to be so; nothing is typed in by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fewer.checkpoint.aliases import ALIASES, DEFAULT_MODEL
from fewer.cli.catalogue import catalogue
from fewer.evaluation.columns import megabytes, percent, rate, small
from fewer.registry import DEFAULTS

Report = dict[str, Any]
Text = Callable[[float], str]
NOT_MEASURED = "not measured"


def methods(pages: str) -> str:
    """Every registered method; `pages` leads to docs/methods, empty or ending with a slash."""
    rows = [
        (
            entry.slot,
            f"[`{entry.name}`]({pages}{entry.name}.md)" + (" (default)" if DEFAULTS[entry.slot] == entry.name else ""),  # type: ignore[index]
            entry.summary,
            "yes" if entry.lossless else "no",
            f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else "–",
            ", ".join(f"`{setting.name}`" for setting in entry.settings) or "–",
        )
        for entry in catalogue()
    ]
    return table(("slot", "method", "what it does", "exact", "paper", "settings"), rows)


def models() -> str:
    """The aliases, with what is downloaded."""
    rows = [
        (
            f"`{alias.name}`" + (" (default)" if alias.name == DEFAULT_MODEL else ""),
            alias.title,
            f"{alias.download_bytes / 1e6:,.0f} MB",
            f"[{alias.licence}]({alias.licence_url})",
        )
        for alias in ALIASES.values()
    ]
    return table(("alias", "model", "download", "licence"), rows)


def peers(report: Report) -> str:
    """fewer beside llama.cpp and transformers on the CPU."""
    engines, ratios, memory, settings = (report[key] for key in ("engines", "ratios", "memory", "settings"))
    measures: list[tuple[str, str, str | None, Text]] = [
        (f"decode after {settings['prompt']} tokens, tokens/s", "decode_tokens_per_second", "decode", rate),
        (f"prefill of {settings['prefill']:,} tokens, tokens/s", "prefill_tokens_per_second", "prefill", rate),
        ("start of Python to first token, s", "first_token_seconds", "first_token", seconds),
        ("of that, after `import torch`, s", "after_torch_seconds", None, seconds),
        ("decode beside a busy core, tokens/s", "busy_decode_tokens_per_second", "busy_decode", rate),
        ("… share of the idle rate", "busy_share", None, percent),
    ]
    rows = []
    for title, figure, ratio, text in measures:
        cells = [spread(engine.get(figure), text) for engine in engines.values()]
        times = [spread(each.get(ratio), factor) if ratio else "–" for each in ratios.values()]
        rows.append((title, *cells, *times))
    peaks = [megabytes(memory["peak_bytes"][engine]) for engine in engines]
    rows.append(("peak resident memory, MB", *peaks, *("–" for _ in ratios)))
    over, limit = memory["fewer_over_import_torch_bytes"], report["bandwidth_bytes_per_second"]["high"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join(
        [
            f"`{report['file']}` on {machine(report)}; {versions}; transformers in bfloat16 with eager attention.",
            f"Medians of {settings['rounds']} interleaved rounds, with lowest and highest; ratios are taken within a "
            "round, and above 1 fewer is the faster one.",
            "",
            table(("", *engines, *(f"× {peer}" for peer in ratios)), rows),
            "",
            f"The peak of fewer is {megabytes(over)} MB over `import torch` alone; the file has "
            f"{megabytes(memory['file_bytes'])} MB. Decoding reads at {spread(report['bandwidth_fraction'], percent)} "
            f"of the {limit / 1e9:.1f} GB/s that the memory gave in the same run.",
        ]
    )


def exactness(report: Report) -> str:
    """Greedy text against transformers in float32."""
    rows = []
    for name, found in report["models"].items():
        tokenizer = found["tokenizer"]
        forms = [form for form in ("raw", "chat") if f"{form}_equal" in tokenizer]
        rows.append(
            (
                f"`{name}`",
                f"{found['equal_answers']} of {found['prompts']}",
                f"{found['equal_tokens']} of {found['compared_tokens']}",
                f"{found['largest_logit_difference']:.1e}",
                f"{found['smallest_gap']:.2g}",
                ", ".join(f"{tokenizer[f'{form}_equal']} of {tokenizer['prompts']} {form}" for form in forms),
            )
        )
    titles = ("model", "equal answers", "equal tokens", "logits within", "nearest tie", "prompts tokenised alike")
    return "\n".join(
        [
            f"On {machine(report)}; transformers {report['machine']['transformers']} decodes the same GGUF file, both "
            "compute in float32. “Logits within” is the largest difference after a prompt over the range of the",
            "logits, “nearest tie” the smallest lead of a best logit that was met.",
            "",
            table(titles, rows),
        ]
    )


def compare(report: Report) -> str:
    """What `fewer compare` measured."""
    rows = [
        (
            f"`{row['recipe']}`" + (" (baseline)" if row["recipe"] == report["baseline"] else ""),
            number(row["weight_bytes"], megabytes),
            number(row["kv_bytes"], megabytes),
            spread(row["prefill_tokens_per_second"], rate),
            spread(row["decode_tokens_per_second"], rate),
            spread(row["ratio_to_baseline"], factor),
            number(row["perplexity"], lambda value: f"{value:.3f}"),
            number(row["kl_divergence"], small),
            number(row["greedy_tokens_unchanged"], percent),
        )
        for row in report["rows"]
    ]
    titles = (
        "recipe", "weights MB", "KV MB", "prefill tok/s", "decode tok/s", "× baseline", "perplexity", "KL", "unchanged",
    )  # fmt: skip
    settings = report["settings"]
    failures = [f"`{row['recipe']}` was not measured: {row['failure']}" for row in report["rows"] if row["failure"]]
    return "\n".join(
        [
            f"`{report['model']}` on {machine(report)}. Medians of {report['rounds']} interleaved rounds, with lowest",
            f"and highest; {settings['prompts']} prompts, answers of at most {settings['max_tokens']} tokens, a timed "
            f"prefill of {settings['prefill_tokens']}. KL and unchanged tokens are held against `weights=dense`.",
            "",
            table(titles, rows),
            *([""] if failures else []),
            *failures,
        ]
    )


def h200(report: Report) -> str:
    """Decoding, prefill and attention on one GPU, with the peers of the same run."""

    def figure(section: str, *path: str) -> Any:
        """A value of a section's result; None where the section failed, was skipped or is missing."""
        found = report.get(section)
        for key in ("result", *path):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def tokens(section: str) -> str:
        runs, middle = figure(section, "runs"), figure(section, "tokens_per_second")
        ends = {"low": min(runs), "high": max(runs)} if runs else {"low": middle, "high": middle}
        return NOT_MEASURED if middle is None else spread({"median": middle, **ends}, rate) + " tokens/s"

    def share(value: float | None, of: str) -> str:
        return NOT_MEASURED if value is None else f"{percent(value)} of {of}"

    def attention(name: str) -> float | None:
        tilings = (figure("attention", name) or {}).values()
        return max((each["of_read"] for each in tilings if isinstance(each, dict)), default=None)

    unequal = next((name for name in figure("attention") or {} if name.startswith("unequal")), "unequal")
    bf16, int4 = figure("llama bf16 decode", "tokens_per_second"), figure("llama int4 decode", "tokens_per_second")
    gain = f" ({int4 / bf16:.2f} × bf16)" if bf16 and int4 else ""
    rows = [
        ("Llama-3-8B, bf16, decode", tokens("llama bf16 decode")),
        ("… a plain PyTorch loop under `torch.compile`", tokens("peer compiled loop llama bf16")),
        ("… transformers, static cache, compiled", tokens("peer transformers static")),
        ("… transformers, eager", tokens("peer transformers eager")),
        ("Llama-3-8B, int8, decode", tokens("llama int8 decode")),
        ("Llama-3-8B, int4 of group 128, decode", tokens("llama int4 decode") + gain),
        ("SmolLM2-135M, bf16, decode", tokens("smollm2 bf16 decode")),
        (
            "Llama-3-8B, bf16, prefill of 8,192 tokens",
            share(figure("llama bf16 prefill", "of_matrix_rate"), "the measured matrix rate"),
        ),
        *(
            (f"attention of one new token, {context} keys", share(attention(name), "the read bandwidth"))
            for context, name in (("32,768", "32768 x1"), ("131,072", "131072 x1"), ("eight rows of unequal", unequal))
        ),
    ]
    worst = figure("check products", "worst_error")
    rows.append(("products against float64, worst relative error", NOT_MEASURED if worst is None else f"{worst:.1e}"))
    read, flops = figure("bandwidth", "read_bytes_per_second"), figure("bandwidth", "bf16_flops")
    limits = f" It reads {read / 1e12:.2f} TB/s and multiplies {flops / 1e12:,.0f} Tflop/s." if read and flops else ""
    about = report.get("environment", {})
    gpu = about.get("gpu", about.get("device", "unknown GPU"))
    return "\n".join(
        [
            f"{gpu}, torch {about.get('torch', '?')}, Triton {about.get('triton', '?')}.{limits}",
            "Shapes of the named models with random weights, batch 1, a prompt of 512 tokens; peers in the same run.",
            "",
            table(("measure", "figure"), rows),
        ]
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; a bar in a cell would end it, so it is escaped."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def machine(report: Report) -> str:
    about = report["machine"]
    commit = f", commit {about['commit']}" if "commit" in about else ""
    threads = f"{about['threads']} thread" + ("s" if about["threads"] != 1 else "")
    return f"{about['processor']}, {about['cores']} cores, {threads}, torch {about['torch']}{commit}"


def spread(value: dict[str, float] | None, text: Text) -> str:
    """`median (low–high)`, without the ends where they read the same."""
    if value is None:
        return "–"
    middle, low, high = (text(value[end]) for end in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low}–{high})"


def number(value: float | None, text: Text) -> str:
    return "–" if value is None else text(value)


def seconds(value: float) -> str:
    return f"{value:.2f}"


def factor(value: float) -> str:
    return f"{value:.2f}"
