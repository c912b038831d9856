"""Teachers that would be cut wrongly are refused by name."""

from types import SimpleNamespace

import pytest

from regate_ds.teacher.shard import FAMILIES, require_cuttable
from tests.models import text_config


@pytest.mark.parametrize("kind", FAMILIES)
def test_known_families_may_be_cut_down_to_one_key_value_head(kind):
    require_cuttable(text_config(kind, heads=(6, 3), hidden_size=36), 3)


@pytest.mark.parametrize("kind", ["internlm2", "gpt2", "mixtral", "phi3"])
def test_other_families_are_refused_by_name(kind):
    config = SimpleNamespace(model_type=kind, num_key_value_heads=8)
    with pytest.raises(ValueError, match=f"a {kind} model is not known to be cut right; these"):
        require_cuttable(config, 2)


def test_a_rank_without_a_key_value_head_is_refused():
    with pytest.raises(ValueError, match="teacher.tensor=4: the teacher has 2 key-value heads"):
        require_cuttable(text_config("llama"), 4)
