"""What the commands say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regate_ds.data.llava.records import Record, SampleError, Turn
from regate_ds.data.llava.template import Template
from regate_ds.recipe.config.sections import DataConfig
from regate_ds.recipe.corpus import corpus_encoder, report_cut
from tests.support.samples import make_index
from tests.support.tiny_students import make_image, make_internvl, make_llava, make_qwen2_vl


def test_samples_that_fill_the_length_are_told(capsys):
    corpus = SimpleNamespace(index=make_index(9))
    longest = int(corpus.index.num_positions.max())
    report_cut(corpus, longest + 1)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    report_cut(corpus, longest)  # type: ignore[arg-type]
    assert f"2 of 9 training samples fill data.max_length={longest}" in capsys.readouterr().out


@pytest.mark.parametrize("make", [make_qwen2_vl, make_llava, make_internvl])
def test_images_that_touch_are_read_or_refused_before_the_model_has_them(make, tmp_path: Path):
    """Qwen2-VL takes a run of placeholders for one image, and fails where it is two."""
    student = make()
    paths = (tmp_path / "a.png", tmp_path / "b.png")
    images = [make_image(seed=seed) for seed in range(2)]
    for image, path in zip(images, paths):
        image.save(path)
    turns = (Turn("<image><image>which", "the first"),)
    record = Record(("set", 0), None, paths, (1, 1), turns, tmp_path / "data.json")
    plain, marked = (
        corpus_encoder(student, DataConfig(train=Path("t"), template=template))
        for template in (Template(), Template(image_start="the "))
    )
    if student.model.config.model_type == "qwen2_vl":
        with pytest.raises(SampleError, match="nothing between them, which this model takes for"):
            plain.encode(record)
    else:
        plain.encode(record)
    sample = marked.encode(record)
    ids_BT = sample.input_ids_S[None]
    marks = student.vision.extra_inputs(ids_BT, sample.is_placeholder_S[None])
    with torch.no_grad():
        logits = student.model(
            input_ids=ids_BT, **student.vision.sample_pixels([images]), **marks
        ).logits
    assert logits.isfinite().all()
