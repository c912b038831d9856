"""Small rows and modules of objectives in double precision, and rows one by one for oracles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from regate_ds.objectives.contract import Inputs, TokenRows, weighted_loss
from tests.support.measure import Gradients, gradients

INPUTS = Inputs(num_tokens=17, pad_id=0, mask_id=1, special_ids=(0, 1, 2))
LENGTHS = (9, 4, 6)

ENCODER = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def body(fields: dict[str, Any], **others: Any) -> nn.Module:
    """A model without a head whose weights are large enough that everything counts."""
    settings = AutoConfig.for_model(**{**fields, **others})
    made = AutoModel.from_config(settings, attn_implementation="eager")
    if getattr(made, "pooler", None) is not None:
        made.pooler = None
    return enlarge(made)


def enlarge(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double()


def make_module(objective: Any, inputs: Inputs = INPUTS) -> nn.Module:
    """The objective's module, of a tiny main model and a helper of one layer and one head."""
    torch.manual_seed(3)
    fields = DECODER if objective.is_causal else ENCODER
    main = body(fields, vocab_size=inputs.num_tokens)
    helper = None
    if objective.helper_divisor is not None:
        sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 8}
        helper = body(fields, vocab_size=1, num_hidden_layers=1, **sizes)
    return enlarge(objective.build(main, helper, inputs))


def make_rows(lengths: tuple[int, ...] = LENGTHS, patches: Tensor | None = None) -> TokenRows:
    """Rows of random tokens, each ending with the special token 2."""
    draws = torch.Generator().manual_seed(5)
    own = [torch.randint(3, 17, (n,), generator=draws) for n in lengths]
    for one in own:
        one[-1] = 2
    ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=0)
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    keys = tuple(("train", 40 + number) for number in range(len(lengths)))
    return TokenRows(keys=keys, ids_BT=ids, is_real_BT=real, patches_BPF=patches)


def loss_and_gradients(
    objective: Any, module: nn.Module, rows: TokenRows
) -> tuple[Tensor, Gradients]:
    """The objective's weighted loss of a micro-batch that is a whole step."""
    draw = objective.draw(rows, INPUTS, seed=7, step=2)
    loss = weighted_loss(module(rows, draw), draw.counts, objective.weights)
    module.zero_grad()
    loss.backward()
    return loss.detach(), gradients(module)


def backward_of(loss: Tensor, module: nn.Module) -> tuple[Tensor, Gradients]:
    module.zero_grad()
    loss.backward()
    return loss.detach(), gradients(module)


def read(body: Any, ids: list[int] | None = None, *, inputs: Tensor | None = None) -> Tensor:
    """States [T, H] of one row alone, which has no padding and so needs no mask."""
    if inputs is None:
        return body(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return body(inputs_embeds=inputs[None]).last_hidden_state[0]


def layer_then_norm(query: nn.Sequential, state: Tensor) -> Tensor:
    """A linear map, GELU and a layer norm, written out."""
    linear, norm = query[0], query[2]
    x = linear.weight @ state + linear.bias
    x = x * 0.5 * (1.0 + torch.erf(x / 2**0.5))
    x = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def token_scores(head: Any, table: Tensor, state: Tensor) -> Tensor:
    """Scores of all tokens by a tied head."""
    return table @ layer_then_norm(head.layer, state) + head.bias


def log_share(scores: Tensor, one: int) -> Tensor:
    """Logarithm of the share of a class."""
    return scores[one] - scores.exp().sum().log()


def sampled(scores: Tensor, draw: float, never: set[int]) -> int:
    """The first token whose cumulated probability is above the draw, added up one by one."""
    shares = [0.0 if n in never else float(s.exp()) for n, s in enumerate(scores.detach())]
    level, total = draw * sum(shares), 0.0
    for token, share in enumerate(shares):
        total += share
        if total > level:
            return token
    raise AssertionError("a draw is below 1")
