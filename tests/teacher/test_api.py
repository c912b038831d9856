"""Reference losses of a data set of users' own, and the loop that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds import Keyed, ReferenceStore, Teacher, score_dataset
from regate_ds.algorithm.batch import IGNORE
from regate_ds.teacher.scoring import score_samples
from tests.support.models import causal_lm
from tests.support.samples import make_samples

PAD, IMAGE = 2, 60


def host_items(num_samples: int) -> list[dict]:
    """Samples as Hugging Face models take them: the label of a position is its own token."""
    items = []
    for sample in make_samples(num_samples):
        labels = torch.full_like(sample.input_ids_S, IGNORE)
        labels[1:] = sample.labels_S[:-1]
        items.append({"input_ids": sample.input_ids_S, "labels": labels})
    return items


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """A user's own, which pads to a multiple of 8."""
    longest = -(-max(len(item["input_ids"]) for item in items) // 8) * 8

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [
            torch.nn.functional.pad(x[name], (0, longest - len(x[name])), value=value)
            for x in items
        ]
        return torch.stack(rows)

    mask = [torch.arange(longest) < len(item["input_ids"]) for item in items]
    return {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", IGNORE),
        "attention_mask": torch.stack(mask).long(),
    }


def test_the_store_has_the_losses_of_the_shifted_labels_with_images_left_out(tmp_path: Path):
    model, samples = causal_lm(), make_samples(7)
    teacher = Teacher(model=model, pad_id=PAD, image_token_id=IMAGE, tokens_per_batch=64)
    score_dataset(Keyed(host_items(7), "set"), collate, teacher, tmp_path / "store")
    store = ReferenceStore(tmp_path / "store")
    expected = torch.cat([score_samples(model, [s], pad_id=PAD) for s in samples])
    found = store.read([("set", number) for number in range(7)])
    assert torch.allclose(found, expected, atol=5e-3)


def test_samples_without_a_label_are_named_before_training(tmp_path: Path, recwarn):
    teacher = Teacher(model=causal_lm(), pad_id=PAD, image_token_id=IMAGE)
    items = host_items(4)
    score_dataset(Keyed(items, "set"), collate, teacher, tmp_path / "labelled")
    assert not [w for w in recwarn if "no label" in str(w.message)]
    items[2]["labels"] = torch.full_like(items[2]["labels"], IGNORE)
    line = r"^1 of 4 samples have no label, such as \('set', 2\): they teach nothing"
    with pytest.warns(UserWarning, match=line):
        score_dataset(Keyed(items, "set"), collate, teacher, tmp_path / "store")


def test_a_data_set_without_samples_is_named(tmp_path: Path):
    teacher = Teacher(model=causal_lm(num_layers=1).eval(), pad_id=0, image_token_id=None)
    with pytest.raises(ValueError, match="the data set has no samples, so there is nothing to sco"):
        score_dataset(Keyed([], "set"), collate, teacher, tmp_path / "store")


def with_pixels(items: list[dict]) -> dict[str, torch.Tensor]:
    return {**collate(items), "pixel_values": torch.zeros(len(items), 3, 4, 4)}


def test_pixels_whose_placeholders_the_teacher_does_not_know_are_refused(tmp_path: Path):
    data = Keyed(host_items(2), "set")
    with pytest.raises(ValueError, match=r"the batch has pixel_values, but .*image_token_id=model"):
        score_dataset(data, with_pixels, Teacher(model=causal_lm(), pad_id=PAD), tmp_path / "no")
    knows = Teacher(model=causal_lm(), pad_id=PAD, video_token_id=IMAGE)
    score_dataset(data, with_pixels, knows, tmp_path / "store")
    score_dataset(
        data, collate, Teacher(model=causal_lm(), pad_id=PAD, image_token_id=IMAGE), tmp_path / "b"
    )
    keys = [("set", 0), ("set", 1)]
    found, wanted = (ReferenceStore(tmp_path / name).read(keys) for name in ("store", "b"))
    assert torch.equal(found, wanted)


def test_a_second_call_finds_the_work_done(tmp_path: Path):
    teacher = Teacher(model=causal_lm(), pad_id=PAD, image_token_id=IMAGE)
    arguments = (Keyed(host_items(3), "set"), collate, teacher, tmp_path / "store")
    assert score_dataset(*arguments).num_tokens > 0
    assert score_dataset(*arguments).num_tokens == 0


def test_ranks_that_have_not_joined_are_not_left_to_do_the_work_each(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    teacher = Teacher(model=causal_lm(), pad_id=PAD)
    with pytest.raises(ValueError, match="this job has 2 ranks: give score_dataset the group"):
        score_dataset(Keyed(host_items(3), "set"), collate, teacher, tmp_path / "store")
    assert not (tmp_path / "store").exists()
