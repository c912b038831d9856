"""Two tokenizers that cut one text very differently, and records of any text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.template import Template
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer

TEXTS = [
    "The number seven is red, and it is in the top row.",
    "The number two is blue. Its place is bottom left.",
    "Z\u00fcrich has the colour \u7ea2; it is small and large.",
] * 4

_PARTS = [
    "seven",
    " ",
    "  ",
    "\n",
    ".",
    "red",
    "the ",
    "\u00e9",
    "e\u0301",
    "\u7ea2\u8272",
    "\U0001f600",
    "x",
    "12",
]


def by_bytes() -> PreTrainedTokenizerFast:
    """Merges of bytes: a character may be spelled by several tokens."""
    return train_tokenizer(TEXTS, vocab_size=300)


def by_pieces() -> PreTrainedTokenizerFast:
    """Likely pieces of characters; one that it does not know is an unknown token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["[unk]", "[end]", "[pad]", "[begin]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=70, special_tokens=special, unk_token="[unk]", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[unk]",
        eos_token="[end]",
        pad_token="[pad]",
        bos_token="[begin]",
    )


def encoder_of(tokenizer: PreTrainedTokenizerFast, max_length: int = 10_000) -> Encoder:
    return Encoder(
        tokenizer,
        image_token="<image>",
        num_image_tokens=lambda size: 3,
        max_length=max_length,
        template=Template(),
    )


def any_text(rng: random.Random) -> str:
    return "".join(rng.choices(_PARTS, k=rng.randint(0, 12)))


def any_record(rng: random.Random, number: int = 0) -> Record:
    """One to three turns, of which some are not learnt; texts may be empty."""
    turns = [Turn(any_text(rng), any_text(rng)) for _ in range(rng.randint(1, 3))]
    turns[1:] = [replace(turn, learn=rng.random() < 0.7) for turn in turns[1:]]
    rng.shuffle(turns)
    own = any_text(rng) if rng.random() < 0.3 else None
    return Record(("set", number), None, (), (), tuple(turns), Path("data.json"), own)
