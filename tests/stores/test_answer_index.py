"""Finding a sample's values, and telling one data set from another."""

from dataclasses import replace

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE
from regate_ds.stores.answer_index import AnswerIndex, spans
from tests.support.samples import make_index, make_samples


def test_locates_every_label_position_once_in_the_order_of_the_keys():
    samples = make_samples(9)
    index = AnswerIndex.build(samples)
    flat = torch.cat([sample.labels_S[sample.labels_S != IGNORE] for sample in samples])
    for order in ([4, 0, 8, 3], [2], [5, 5], []):
        expected = [samples[i].labels_S[samples[i].labels_S != IGNORE] for i in order]
        located = index.locate([samples[i].key for i in order])
        assert located.dtype == torch.int64
        assert flat[located].tolist() == [n for part in expected for n in part.tolist()]
    assert index.num_tokens == flat.numel()


def test_rows_are_the_order_in_which_the_samples_came():
    index = make_index(6)
    assert index.rows([("set", 15), ("set", 10)]) == [5, 0]


def test_a_sample_without_labels_takes_no_room():
    samples = make_samples(3)
    silent = replace(samples[1], labels_S=torch.full_like(samples[1].labels_S, IGNORE))
    index = AnswerIndex.build([samples[0], silent, samples[2]])
    assert index.locate([silent.key]).numel() == 0
    assert index.locate([samples[2].key])[0] == index.num_labels[0]


def test_lengths_count_prompt_and_placeholders():
    samples = make_samples(5)
    lengths = AnswerIndex.build(samples).num_positions
    assert lengths.tolist() == [sample.input_ids_S.numel() for sample in samples]


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"'set' record 99 is not in the answer index"):
        make_index(3).locate([("set", 10), ("set", 99)])


def test_a_key_that_occurs_twice_is_named():
    samples = make_samples(3)
    with pytest.raises(ValueError, match="'set' record 11 is in the data twice"):
        AnswerIndex.build([*samples, samples[1]])


def _changed(samples, change: str):
    first = samples[0]
    labels_S, is_placeholder_S = first.labels_S.clone(), first.is_placeholder_S.clone()
    if change == "a label":
        labels_S[labels_S != IGNORE] += 1
    if change == "truncation":
        labels_S[-2] = IGNORE
    input_ids_S = first.input_ids_S.clone()
    if change == "a word of the question":
        input_ids_S[~is_placeholder_S & (labels_S == IGNORE)] += 1
    if change == "placeholders":
        is_placeholder_S[0] = ~is_placeholder_S[0]
    name = "other" if change == "the name" else first.key[0]
    changed = replace(
        first,
        key=(name, 10),
        input_ids_S=input_ids_S,
        labels_S=labels_S,
        is_placeholder_S=is_placeholder_S,
    )
    rest = samples[1:]
    return [*rest, changed] if change == "the order" else [changed, *rest]


@pytest.mark.parametrize(
    "change",
    ["a label", "a word of the question", "truncation", "placeholders", "the name", "the order"],
)
def test_the_fingerprint_changes_with(change):
    samples = make_samples(4)
    changed = AnswerIndex.build(_changed(samples, change))
    assert changed.fingerprint != AnswerIndex.build(samples).fingerprint


def test_the_id_that_stands_for_images_is_not_in_the_fingerprint():
    samples = make_samples(4)
    others = [
        replace(s, input_ids_S=s.input_ids_S.masked_fill(s.is_placeholder_S, 7)) for s in samples
    ]
    assert AnswerIndex.build(others) == AnswerIndex.build(samples)


def test_equal_data_gives_equal_indexes():
    assert make_index(4) == make_index(4)
    assert make_index(4) != make_index(5)


def test_the_fingerprint_of_data_stays_what_it_is_in_stores_on_disk():
    fingerprint = "b5967a375cb94d963913fe690884f35308de265d7e90358669110ee8d21b688c"
    assert make_index(9).fingerprint == fingerprint


def test_saving_and_loading_changes_nothing(tmp_path):
    index = make_index(7)
    index.save(tmp_path / "one.npz")
    index.save(tmp_path / "two.npz")
    loaded = AnswerIndex.load(tmp_path / "one.npz")
    assert loaded == index
    assert loaded.keys == index.keys
    assert torch.equal(loaded.offsets, index.offsets)
    assert torch.equal(loaded.num_positions, index.num_positions)
    assert torch.equal(loaded.label_hashes, index.label_hashes)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_a_file_that_is_not_an_index_is_named(tmp_path):
    path = tmp_path / "index.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"cannot read the answer index .*index\.npz"):
        AnswerIndex.load(path)


def test_spans_are_the_ranges_one_after_the_other():
    starts, lengths = torch.tensor([7, 0, 3, 3]), torch.tensor([2, 0, 3, 1])
    assert spans(starts, lengths).tolist() == [7, 8, 3, 4, 5, 3]


def test_labels_that_were_not_shifted_are_refused():
    sample = make_samples(1)[0]
    is_label_S = sample.labels_S != IGNORE
    own = sample.input_ids_S.where(is_label_S, torch.tensor(IGNORE))
    with pytest.raises(ValueError, match="'set' record 10: its labels are each position's own"):
        AnswerIndex.build([replace(sample, labels_S=own)])


def test_an_answer_that_repeats_one_token_is_not_mistaken_for_unshifted_labels():
    sample = make_samples(2)[1]
    same = torch.full_like(sample.input_ids_S, 7)
    labels_S = same.where(sample.labels_S != IGNORE, torch.tensor(IGNORE))
    assert AnswerIndex.build([replace(sample, input_ids_S=same, labels_S=labels_S)]).num_tokens
