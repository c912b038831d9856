"""Plain text as blocks of tokens: what a document is, which are held out, and what a row holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.recipe.tasks.text.blocks import open_text, token_blocks
from regate_ds.recipe.tasks.text.documents import hold_out, read_documents

LINES = [f"word{n}: the gloss number {n} of a list\n" for n in range(200)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "glosses"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def test_a_document_is_a_line_or_a_paragraph(tmp_path: Path):
    (tmp_path / "b.md").write_text("three\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n  one more\n\n \ntwo\n", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["one", "one more", "two", "three"]
    assert read_documents(tmp_path, by="paragraph") == ["one one more", "two", "three"]


def test_the_words_of_a_document_alone_decide_whether_it_is_held_out(text: Path):
    documents = read_documents(text)
    train, others = hold_out(documents, share=0.25)
    assert sorted(train + others) == sorted(documents)
    assert 30 <= len(others) <= 70
    assert hold_out(documents[::-1] * 2, share=0.25)[1] == others[::-1] * 2


def test_rows_hold_the_documents_one_behind_another(text: Path):
    blocks = open_text(text, length=16, vocab_size=300, held_out=0.25)
    documents = read_documents(text)
    for rows, side in zip(
        (blocks.train_NT, blocks.held_out_NT), hold_out(documents, share=0.25), strict=True
    ):
        written = blocks.tokenizer.decode(rows.reshape(-1))
        whole = "".join(one + "</s>" for one in side)
        assert whole.startswith(written)
        assert len(whole) - len(written) < 16 * 8
    assert torch.equal(
        open_text(text, length=16, vocab_size=300, held_out=0.25).train_NT, blocks.train_NT
    )


def test_what_is_no_text_is_refused_by_name(text: Path, tmp_path: Path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="bad: is not UTF-8"):
        read_documents(tmp_path / "bad")
    with pytest.raises(ValueError, match="empty.txt: holds no text"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="none: has no file that ends in"):
        read_documents(tmp_path / "none")
    with pytest.raises(ValueError, match="missing: no such file or folder"):
        read_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="by='word': must be one of"):
        read_documents(text, by="word")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"share=0.5 of 1 documents leaves"):
        hold_out(["one"], share=0.5)
    with pytest.raises(ValueError, match="share=1.0: must be above 0"):
        hold_out(["one"], share=1.0)
    tokenizer = open_text(text, length=16, vocab_size=300, held_out=0.25).tokenizer
    with pytest.raises(ValueError, match="length=99: 1 documents of"):
        token_blocks(["one"], tokenizer, length=99)
