"""What the commands say."""

from types import SimpleNamespace

from regate_ds.recipe.corpus import report_cut
from tests.support.samples import make_index


def test_samples_that_fill_the_length_are_told(capsys):
    corpus = SimpleNamespace(index=make_index(9))
    longest = int(corpus.index.num_positions.max())
    report_cut(corpus, longest + 1)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    report_cut(corpus, longest)  # type: ignore[arg-type]
    assert f"2 of 9 training samples fill data.max_length={longest}" in capsys.readouterr().out
