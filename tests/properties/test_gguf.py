"""A GGUF header says which model and which tokens it holds; whatever else it says is told."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.teacher.loading import load_teacher, load_teacher_config, load_teacher_tokenizer
from tests.properties.test_files import damaged
from tests.support.gguf_files import write_gguf
from tests.support.models import causal_lm

few = settings(max_examples=max(3, settings.default.max_examples // 5))
TEXTS = ["What is it?", "A red 7."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers.utils.logging.disable_progress_bar()
    return train_tokenizer(TEXTS, vocab_size=270)


@few
@given(
    num_layers=st.integers(1, 3),
    heads=st.sampled_from([(2, 1), (2, 2), (4, 2)]),
    width=st.sampled_from([8, 16]),
    hidden=st.sampled_from([16, 24]),
)
def test_the_model_of_a_file_is_the_one_that_was_written(
    num_layers: int,
    heads: tuple[int, int],
    width: int,
    hidden: int,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
):
    sizes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": width,
        "hidden_size": heads[0] * width,
        "intermediate_size": hidden,
        "vocab_size": len(tokenizer),
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    path = tmp_path_factory.mktemp("gguf") / "teacher.gguf"
    write_gguf(model, tokenizer, path)
    config = load_teacher_config(path)
    assert {name: getattr(config, name) for name in sizes} == sizes
    ids = torch.arange(7)[None]
    assert torch.equal(load_teacher(path)(ids).logits, model(ids).logits)
    found = load_teacher_tokenizer(path)
    assert found(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.fixture(scope="module")
def written(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A file, its bytes, and the length of its header."""
    path = tmp_path_factory.mktemp("gguf") / "teacher.gguf"
    write_gguf(causal_lm(num_layers=1, vocab_size=len(tokenizer)), tokenizer, path)
    content = path.read_bytes()
    return path, content, content.index(b"token_embd.weight") + 600


HUGE = [0, 255, 2**31, 2**33, 2**40, 2**62, 2**64 - 1]


@few
@given(data=st.data())
def test_a_damaged_header_is_read_or_told_by_its_file(
    data: st.DataObject, written: tuple[Path, bytes, int]
):
    path, content, length = written
    if data.draw(st.booleans()):
        changed = data.draw(damaged(content[:length])) + content[length:]
    else:
        # A number that tells of far more than the file holds.
        at = data.draw(st.sampled_from([8, 16]) | st.integers(0, length))
        number = struct.pack("<Q", data.draw(st.sampled_from(HUGE)))
        changed = content[:at] + number + content[at + 8 :]
    path.write_bytes(changed)
    for read in (load_teacher_tokenizer, load_teacher):
        try:
            read(path)
        except ValueError as error:
            (line,) = str(error).splitlines()
            assert str(path) in line
