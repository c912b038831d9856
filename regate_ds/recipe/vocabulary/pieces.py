"""What each new token was for the old tokenizer: a token of it, or several.

Fast vocabulary transfer (Gee et al., arXiv 2402.09977): a token that both have keeps its row of the
embedding; a new one gets the mean of the rows of its old pieces.
"""

from __future__ import annotations

import json
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from regate_ds.recipe.vocabulary.bpe import added_ids

_BYTE_OF = {sign: byte for byte, sign in bytes_to_unicode().items()}
_SIGN_OF = bytes_to_unicode()
_SPACE = "\u2581"
"""What stands for a space in tokenizers that were made by sentencepiece."""


def old_pieces(old: Any, new: Any) -> list[list[int]]:
    """Return for each id of the new tokenizer the old tokenizer's ids of the same text.

    new: a byte-level tokenizer with the old one's added tokens. ValueError if the old one has no
    words for some bytes.
    """
    vocabulary, model = old.get_vocab(), old.backend_tokenizer.model
    write = _by_bytes if _is_byte_level(old) else _by_sentencepiece
    added = added_ids(new)
    pieces: list[list[int]] = []
    for number, token in enumerate(new.convert_ids_to_tokens(range(len(new)))):
        if number in added:
            pieces.append([vocabulary[token]])
            continue
        found = write(bytes(_BYTE_OF[sign] for sign in token), vocabulary, model)
        if not found:
            raise ValueError(
                f"the old tokenizer, a {type(old).__name__}, has no tokens for the bytes of "
                f"{token!r}; this kind of tokenizer cannot be replaced yet"
            )
        pieces.append(found)
    return pieces


def _is_byte_level(tokenizer: Any) -> bool:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return "ByteLevel" in json.dumps([rules["pre_tokenizer"], rules["decoder"]])


def _by_bytes(content: bytes, vocabulary: dict[str, int], model: Any) -> list[int]:
    text = "".join(_SIGN_OF[byte] for byte in content)
    return _pieces(text, vocabulary, model)


def _by_sentencepiece(content: bytes, vocabulary: dict[str, int], model: Any) -> list[int]:
    try:
        text = content.decode("utf-8").replace(" ", _SPACE)
    except UnicodeDecodeError:
        # A part of a character: such tokenizers have a token for each byte, if anything.
        names = [f"<0x{byte:02X}>" for byte in content]
        return [vocabulary[name] for name in names if name in vocabulary]
    return _pieces(text, vocabulary, model)


def _pieces(text: str, vocabulary: dict[str, int], model: Any) -> list[int]:
    if text in vocabulary:
        return [vocabulary[text]]
    return [token.id for token in model.tokenize(text)]
