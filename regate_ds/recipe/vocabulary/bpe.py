"""Train a byte-level BPE tokenizer that stands in for another one.

It has the other's added tokens, in its order, the other's settings, chat template and Unicode
form; words, merges and ids are new. Texts are cut as for GPT-4 before merges are made, the rule
that Dagan et al. (arXiv 2402.01035) recommend, and any text round-trips, up to that form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_ENDINGS = r"'(?i:s|d|m|t|ll|ve|re)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_DIGITS = r"\p{N}{1,3}"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINE_ENDS = r"\s*[\r\n]+"
_SPACE_BEFORE_LAST = r"\s+(?!\S)"
_SPACE = r"\s+"
PIECES = "|".join((_ENDINGS, _WORD, _DIGITS, _SIGNS, _LINE_ENDS, _SPACE_BEFORE_LAST, _SPACE))
"""The pieces of a text, in the order in which they are tried; no token is longer than a piece.

Endings such as 's; a word with the one sign or space before it; up to three digits; signs with the
space before and the line ends after them; line ends with the space before; and of other space, all
but what belongs to the word that follows.
"""

_BYTE = re.compile("<0x[0-9A-F]{2}>")

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")

MIN_FREQUENCY = 2
"""Times that a pair must occur to be merged."""

_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json")
"""Files of the other tokenizer that would contradict the new one."""

_OF_ITS_WORDS = ("added_tokens_decoder", "add_prefix_space", "add_bos_token", "add_eos_token")
"""Settings that say how the other one read; what it adds is in the rules themselves."""


def train_in_place_of(
    other: PreTrainedTokenizerFast, texts: Iterable[str], *, size: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most ``size`` tokens, added ones included.

    ValueError if there is no room for the bytes and the added tokens, or the other one has no rules
    that can be read.
    """
    if getattr(other, "backend_tokenizer", None) is None:
        raise ValueError(
            f"a {type(other).__name__} is a slow tokenizer, whose rules cannot be read; put a "
            "tokenizer.json into the student's folder"
        )
    added = list(_added(other).values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(added) + len(alphabet):
        raise ValueError(
            f"--size {size}: {len(alphabet)} bytes and {len(added)} added tokens need "
            f"{len(alphabet) + len(added)}; give more"
        )
    rules = Tokenizer(models.BPE())
    rules.normalizer = _unicode_form(other)
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=added,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    rules.train_from_iterator(texts, trainer)
    new = _with_settings(other, rules)
    _require_same_additions(other, new)
    return new


def added_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the added tokens: what is read before a text is cut into words."""
    return frozenset(_added(tokenizer))


def _added(tokenizer: Any) -> dict[int, AddedToken]:
    # Some tokenizers have the tokens of single bytes among them, which are words like others.
    found = sorted(tokenizer.added_tokens_decoder.items())
    return {one: token for one, token in found if not _BYTE.fullmatch(token.content)}


def _unicode_form(tokenizer: Any) -> Any:
    """Return the Unicode form that a tokenizer puts texts into; it is all that is kept of how it
    changes them."""
    rule = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] or {}
    names = [one["type"] for one in rule.get("normalizers", [rule]) if one.get("type") in _FORMS]
    return normalizers.Sequence([getattr(normalizers, name)() for name in names]) if names else None


def _with_settings(other: PreTrainedTokenizerFast, rules: Tokenizer) -> PreTrainedTokenizerFast:
    tree = json.loads(rules.to_str())
    theirs = json.loads(other.backend_tokenizer.to_str())
    ids = rules.get_vocab()
    tree["post_processor"] = _with_ids(theirs["post_processor"], ids)
    # The trainer has taken all of them for special ones.
    kept = {token.content for token in _added(other).values()}
    added = (token for token in theirs["added_tokens"] if token["content"] in kept)
    tree["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in added]
    with TemporaryDirectory() as name:
        folder = Path(name)
        other.save_pretrained(folder)
        for file in _FILES:
            (folder / file).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in _OF_ITS_WORDS}
        path.write_text(json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}))
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _with_ids(rule: Any, ids: dict[str, int]) -> Any:
    """Return a post-processor's rule, in which each special token has its new id."""
    if isinstance(rule, list):
        return [_with_ids(one, ids) for one in rule]
    if not isinstance(rule, dict):
        return rule
    new = {key: _with_ids(value, ids) for key, value in rule.items()}
    if "tokens" in rule and "ids" in rule:
        new["ids"] = [ids[token] for token in rule["tokens"]]
    for key in {"cls", "sep"} & rule.keys():
        new[key] = [rule[key][0], ids[rule[key][0]]]
    return new


def _require_same_additions(other: Any, new: Any) -> None:
    """Refuse, by ValueError, a tokenizer whose texts do not begin and end as the other's do."""
    before, after = _additions(other), _additions(new)
    if before != after:
        raise ValueError(
            f"a {type(other).__name__} puts {before} around a text, the new tokenizer {after}; "
            "this kind of tokenizer cannot be replaced yet"
        )


def _additions(tokenizer: Any) -> list[str]:
    added = added_ids(tokenizer)
    return tokenizer.convert_ids_to_tokens([n for n in tokenizer("a").input_ids if n in added])
