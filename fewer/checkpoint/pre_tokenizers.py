"""How byte-level BPE cuts text into words before it merges: one rule for each `tokenizer.ggml.pre`.

A model must see the cuts that it was trained with, so an unknown name is an error, never a guess. The expressions are
those of the models' own tokenizer.json files; what they leave unmatched becomes a word of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from fewer.errors import CheckpointError

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"  # the caseless belong to both


def _words(numbers: str, letters: str = r"\p{L}", rest: str = r"[^\s\p{L}\p{N}]") -> str:
    """The family of GPT-4's rule: contractions, words with one leading sign, numbers, punctuation, line ends."""
    return rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}| ?{rest}+[\r\n]*|{_SPACES}"


def _cased_words(numbers: str, contraction: str) -> str:
    """The family of GPT-4o's rule: a word ends where its case changes."""
    sign = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{sign}{_UPPER}*{_LOWER}+{contraction}|{sign}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizerRule:
    """Expressions applied one after the other, each to the words that the one before it left."""

    splits: tuple[str, ...]
    nfc: bool = False  # characters are composed first
    whole_words: bool = False  # a word that is in the vocabulary is taken as it is, without merging
    adds_bos: bool = False  # unless the file says otherwise


_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_RULES: dict[str, PreTokenizerRule] = {
    "default": PreTokenizerRule(_DEFAULT),
    "gpt-2 phi-2 mpt jais gigachat a.x-4.0 mellum exaone4 trillion": PreTokenizerRule((_GPT2,)),
    "olmo": PreTokenizerRule((_GPT2,), nfc=True),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": PreTokenizerRule((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2": PreTokenizerRule(
        (_words(r"\p{N}{1,3}"),), whole_words=True, adds_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizerRule((_words(r"\p{N}{1,3}"),)),
    "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan grok-2": PreTokenizerRule((_words(r"\p{N}"),), nfc=True),
    "qwen35": PreTokenizerRule((_words(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"),), nfc=True),
    "gpt-4o llama4": PreTokenizerRule((_cased_words(r"\p{N}{1,3}", rf"(?i:{_CONTRACTIONS})?"),)),
    "tekken": PreTokenizerRule((_cased_words(r"\p{N}", ""),), whole_words=True, adds_bos=True),
    "deepseek-v3 hunyuan-dense": PreTokenizerRule(_DEEPSEEK_3),
    "falcon": PreTokenizerRule(_FALCON),
}
_BY_NAME = {name: rule for names, rule in _RULES.items() for name in names.split()}


def find_rule(name: str) -> PreTokenizerRule:
    """The rule called `name`; CheckpointError names the known ones."""
    if name not in _BY_NAME:
        raise CheckpointError(
            f"the tokenizer's pre-tokenizer '{name}' is not known: known are {', '.join(sorted(_BY_NAME))}; "
            "try a file of the same model in Hugging Face layout, which spells its rule out"
        )
    return _BY_NAME[name]


def build_pre_tokenizer(rule: PreTokenizerRule) -> pre_tokenizers.PreTokenizer:
    """Words, then bytes as printable characters."""
    if rule.splits[-1] == _GPT2:  # built in, and faster than the same expression
        last = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        splits = rule.splits[:-1]
    else:
        last = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        splits = rule.splits
    return pre_tokenizers.Sequence([*(_split(expression) for expression in splits), *last])


def build_normalizer(rule: PreTokenizerRule) -> normalizers.Normalizer | None:
    return normalizers.NFC() if rule.nfc else None


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    if expression == r"\p{N}":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(expression), behavior="isolated")
