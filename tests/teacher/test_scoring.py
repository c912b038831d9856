"""What the teacher sees, and that its losses are those of the full logits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from regate_ds.algorithm.batch import IGNORE
from regate_ds.teacher.scoring import require_ids_fit, score_samples, teacher_inputs
from regate_ds.teacher.tokenizers.same import choose_pad_id, require_same_tokens
from tests.support.models import VOCABULARY, causal_lm
from tests.support.samples import make_sample, make_samples

PAD = 1


def test_placeholders_become_the_pad_token_and_stay_attended():
    samples = [make_sample(0, prompt=2, answer=2, images=3), make_sample(1, prompt=1, answer=1)]
    ids = [sample.input_ids_S for sample in samples]
    ids_BT, mask_BT, positions_BT = teacher_inputs(ids, [s.is_placeholder_S for s in samples], PAD)
    text = ids[0][3:].tolist()
    assert ids_BT.tolist() == [[PAD] * 3 + text, ids[1].tolist() + [PAD] * 5]
    assert mask_BT.tolist() == [[1] * 7, [1] * 2 + [0] * 5]
    assert positions_BT.tolist() == [list(range(7))] * 2


def test_a_pad_token_in_the_text_is_attended():
    ids_S = torch.tensor([5, PAD, 7, PAD])
    inputs = teacher_inputs([ids_S], [torch.zeros(4, dtype=torch.bool)], PAD)
    assert inputs.attention_mask_BT.tolist() == [[1, 1, 1, 1]]


def _loss_of_full_logits(teacher, sample) -> torch.Tensor:
    """One sample alone, all logits in fp64, no mask and no padding."""
    ids_S = sample.input_ids_S.masked_fill(sample.is_placeholder_S, PAD)
    with torch.no_grad():
        logits_TV = teacher.double()(input_ids=ids_S[None]).logits[0]
    is_label = sample.labels_S != IGNORE
    return F.cross_entropy(logits_TV[is_label], sample.labels_S[is_label], reduction="none")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("num_ids", [4, 4096])
def test_losses_are_those_of_the_full_logits(kind, num_ids):
    samples = make_samples(6)
    scored_N = score_samples(causal_lm(kind).eval(), samples, pad_id=PAD, num_ids=num_ids)
    assert scored_N.dtype == torch.float32
    teacher = causal_lm(kind).eval()
    expected_N = torch.cat([_loss_of_full_logits(teacher, sample) for sample in samples])
    # fp32 against fp64 through three layers.
    torch.testing.assert_close(scored_N.double(), expected_N, rtol=1e-5, atol=1e-5)


def test_the_company_in_a_batch_does_not_matter():
    teacher, samples = causal_lm().eval(), make_samples(5)
    together_N = score_samples(teacher, samples, pad_id=PAD)
    alone = [score_samples(teacher, [sample], pad_id=PAD) for sample in samples]
    # Sums run over other lengths, so the last digits may differ.
    torch.testing.assert_close(together_N, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_pad_token_that_equals_eos_changes_no_loss_of_the_text():
    sample, eos = make_sample(0, prompt=4, answer=6), 9
    sample.input_ids_S[2] = eos
    longer = make_sample(1, prompt=4, answer=20)
    teacher = causal_lm().eval()
    with_eos = score_samples(teacher, [sample, longer], pad_id=eos)
    with_pad = score_samples(teacher, [sample, longer], pad_id=PAD)
    assert torch.equal(with_eos, with_pad)


def test_a_head_of_another_kind_is_refused():
    teacher = causal_lm().eval()
    teacher.lm_head = torch.nn.Sequential(teacher.lm_head)
    with pytest.raises(ValueError, match="lm_head is a Sequential, not a plain linear layer"):
        score_samples(teacher, make_samples(1), pad_id=PAD)


def test_an_image_id_beyond_the_embedding_is_fine_but_a_text_id_is_named():
    teacher = causal_lm().eval()
    outside = make_sample(0, prompt=3, answer=3, images=2, vocabulary=VOCABULARY - 1)
    outside.input_ids_S[:2] = VOCABULARY + 5
    assert bool(score_samples(teacher, [outside], pad_id=PAD).isfinite().all())
    outside.input_ids_S[3] = VOCABULARY + 7
    with pytest.raises(ValueError, match="token id 68 is beyond the teacher's 61 embedding rows"):
        score_samples(teacher, [outside], pad_id=PAD)


def test_a_pad_token_beyond_the_embedding_is_named():
    with pytest.raises(ValueError, match="token id 61 is beyond"):
        score_samples(causal_lm().eval(), make_samples(1), pad_id=VOCABULARY)


class Unknown(torch.nn.Module):
    """A class that the families do not know, around the parts of one that they do."""

    def __init__(self, llama):
        super().__init__()
        self.config, self.model, self.lm_head = llama.config, llama.model, llama.lm_head
        self.get_input_embeddings = llama.get_input_embeddings


def test_a_class_that_is_not_known_may_not_change_its_logits():
    teacher, samples = causal_lm().eval(), make_samples(1)
    unknown = Unknown(teacher)
    wanted_N = score_samples(teacher, samples, pad_id=PAD)
    assert torch.equal(score_samples(unknown, samples, pad_id=PAD), wanted_N)
    for name in ("final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier"):
        setattr(unknown.config, name, 30.0)
        with pytest.raises(ValueError, match=rf"{name}=30\.0 .* not known of Unknown"):
            score_samples(unknown, samples, pad_id=PAD)
        setattr(unknown.config, name, None)


def test_ids_fit_unless_one_is_beyond_the_rows():
    require_ids_fit([0, 9, 50], 10, placeholder_ids=[50])
    with pytest.raises(ValueError, match="token id 10 is beyond the teacher's 10"):
        require_ids_fit([0, 12, 10, 50], 10, placeholder_ids=[50])


def test_the_pad_token_stands_for_images_and_eos_where_there_is_none(caplog):
    assert choose_pad_id(SimpleNamespace(pad_token_id=0, eos_token_id=2)) == 0
    with caplog.at_level(logging.INFO):
        assert choose_pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2
    assert "eos token stands for images" in caplog.text
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        choose_pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=None))


TEXT = ["the red digit is at the top", "a blue digit is below the red one"]
SPECIAL = ["<s>", "</s>", "<image>", "<pad>"]


def _tokenizer(texts=TEXT, special=SPECIAL, added=(), vocab_size=290) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_equal_tokenizers_fit():
    require_same_tokens(_tokenizer(), _tokenizer(), placeholder_ids=[2])


def test_placeholders_and_a_padding_token_may_differ():
    other = _tokenizer(special=["<s>", "</s>", "<unused1>", "<unused2>"])
    require_same_tokens(_tokenizer(), other, placeholder_ids=[2])


def test_a_token_that_the_teacher_lacks_is_named():
    student = _tokenizer(added=["<speaker>"])
    number = student.convert_tokens_to_ids("<speaker>")
    with pytest.raises(ValueError, match=f"id {number} is '<speaker>' for the student and None"):
        require_same_tokens(student, _tokenizer(), placeholder_ids=[2])


def test_only_the_ids_that_occur_are_compared_if_they_are_given():
    student = _tokenizer(added=["<speaker>"])
    number = student.convert_tokens_to_ids("<speaker>")
    require_same_tokens(student, _tokenizer(), placeholder_ids=[2], ids=range(number))
    with pytest.raises(ValueError, match="<speaker>"):
        require_same_tokens(student, _tokenizer(), placeholder_ids=[2], ids=[5, number])


def test_the_first_id_that_means_something_else_is_named():
    other = _tokenizer(special=["</s>", "<s>", "<image>", "<pad>"])
    with pytest.raises(ValueError, match="token id 0 is '<s>' for the student and '</s>' for the"):
        require_same_tokens(_tokenizer(), other, placeholder_ids=[2])


def test_the_first_merge_that_differs_is_named():
    one, other = _tokenizer(), _tokenizer(TEXT[::-1] + ["zzz zzz zzz zzz zzz zzz"])
    with pytest.raises(ValueError, match=r"merge \d+ is \[.*\] for the student and \[.*\] for the"):
        require_same_tokens(one, other, placeholder_ids=[2], ids=range(250))


def test_a_merge_that_is_missing_at_the_end_is_named():
    one, other = _tokenizer(), _tokenizer(vocab_size=265)
    with pytest.raises(ValueError, match=r"merge 5 is \[.*\] for the student and absent for"):
        require_same_tokens(one, other, placeholder_ids=[2], ids=range(250))


def test_a_tokenizer_of_another_kind_is_refused():
    words = _tokenizer().get_vocab()
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    with pytest.raises(ValueError, match="the student's is of kind BPE, the teacher's WordLevel"):
        require_same_tokens(_tokenizer(), other, placeholder_ids=[2])


def test_a_slow_tokenizer_is_refused():
    slow = SimpleNamespace(get_vocab=_tokenizer().get_vocab, pad_token_id=None, eos_token_id=1)
    with pytest.raises(ValueError, match="is a slow tokenizer, whose merges cannot be compared"):
        require_same_tokens(_tokenizer(), slow, placeholder_ids=[2])
