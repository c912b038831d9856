"""The probe of frozen states, and WordNet's glosses, which it reads the classes of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.objectives.free_language_modeling import FreeLanguageModeling
from regate_ds.objectives.plain import Masked
from regate_ds.recipe.pretrain.probe import accuracy, fitted_scores, mean_ranking, pooled_states
from regate_ds.recipe.pretrain.wordnet import Gloss, read_glosses
from tests.objectives.small_helper import make_module, make_rows

NOUN = '00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is  perceived; "a | b"  \n'
VERB = "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs  \n"


def test_a_gloss_has_the_number_of_its_lexicographers_file(tmp_path: Path):
    for name, lines in {"noun": "  1 licence\n" + NOUN, "verb": VERB, "adj": "", "adv": ""}.items():
        (tmp_path / f"data.{name}").write_text(lines)
    wanted = [Gloss('that which is perceived; "a | b"', 3), Gloss("draw air into the lungs", 29)]
    assert read_glosses(tmp_path) == wanted
    (tmp_path / "data.adv").write_text("no gloss\n")
    with pytest.raises(ValueError, match="data.adv: cannot be read as WordNet's .*; give the fol"):
        read_glosses(tmp_path)


def test_the_linear_map_is_that_of_least_squares_with_a_penalty():
    draws = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 4, generator=draws, dtype=torch.float64) for n in (30, 7))
    wanted = torch.randn(30, 2, generator=draws, dtype=torch.float64)
    x = (train - train.mean(0)) / train.std(0)
    penalty = (0.01 * 30) ** 0.5 * torch.eye(4, dtype=torch.float64)
    y = torch.cat([wanted - wanted.mean(0), torch.zeros(4, 2, dtype=torch.float64)])
    plain = torch.linalg.lstsq(torch.cat([x, penalty]), y).solution
    expected = (test - train.mean(0)) / train.std(0) @ plain + wanted.mean(0)
    assert torch.allclose(fitted_scores(train, wanted, test), expected, rtol=1e-6)


def test_a_ranking_is_the_share_of_pairs_in_order():
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    holds = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    # First class: 2 beats 1 and 0, and ties with 2. Second: 0 ties twice, 1 wins twice.
    assert mean_ranking(scores, holds) == pytest.approx((2.5 / 3 + 3 / 4) / 2)
    assert accuracy(scores, torch.tensor([0, 0, 1, 1])) == 0.75


@pytest.mark.parametrize("objective", [Masked(), FreeLanguageModeling(query_heads=3)])
def test_pooled_states_do_not_depend_on_neighbours(objective: Masked | FreeLanguageModeling):
    module = make_module(objective)
    together = pooled_states(module, [make_rows((9, 4))], of_patches=False)
    alone = pooled_states(module, [make_rows((9,))], of_patches=False)
    assert torch.allclose(together[:1], alone, rtol=1e-10)
    assert module.training
