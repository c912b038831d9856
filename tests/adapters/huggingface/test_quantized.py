"""Quantized bases under LoRA, against the oracle on the weights that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from tests.adapters.huggingface.gated_cases_helper import (
    LOSS_TOLERANCE,
    TOLERANCE,
    exact_run,
    fast_run,
    text_case,
)
from tests.adapters.huggingface.test_lora import ALL_LINEAR, with_lora
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.planning import gate_layers

BLOCK = 16


class FourBit(nn.Linear):
    """Two weights a byte, and a scale for each block: not floats, and not of the layer's shape."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        blocks = plain.weight.detach().reshape(-1, BLOCK)
        self.register_buffer("scale", blocks.abs().amax(1, keepdim=True) / 7)
        code = (blocks / self.scale).round().to(torch.int64).add(8).reshape(-1)
        packed = (16 * code[::2] + code[1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dequantized(self) -> Tensor:
        code = torch.stack([self.weight // 16, self.weight % 16], dim=1).to(self.scale.dtype) - 8
        return (code.reshape(-1, BLOCK) * self.scale).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized().to(x.dtype))


def replaced(model: nn.Module, change: Callable[[nn.Module], nn.Linear | None]) -> nn.Module:
    """Replace what ``change`` returns another module for, but the head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = None if name == "lm_head" else change(child)
            if new is not None:
                setattr(parent, name, new)
    return model


def by_hand(folder: Path) -> nn.Module:
    return replaced(causal_lm(), lambda m: FourBit(m) if type(m) is nn.Linear else None)


def by_bitsandbytes(folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    plain = causal_lm()
    plain.save_pretrained(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return type(plain).from_pretrained(
        folder, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
    )


def plain_of(module: nn.Module) -> nn.Linear | None:
    """A plain layer in fp64 with the weight that a quantized one stands for."""
    if isinstance(module, FourBit):
        weight = module.dequantized()
    elif type(module).__module__ == "bitsandbytes.nn.modules":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        return None
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.double)
    plain.weight = nn.Parameter(weight.double(), requires_grad=False)
    return plain


@pytest.mark.parametrize("make", [by_hand, by_bitsandbytes])
@pytest.mark.parametrize("rows", [[[20], [13]], [[9, 11], [13]]])
def test_adapters_on_a_quantized_base_are_exact(make: Callable, rows: list, tmp_path: Path):
    model = with_lora(make(tmp_path), ALL_LINEAR)
    case, gated = text_case(rows), range(1, 3)
    exact = replaced(copy.deepcopy(model), plain_of)
    wanted_loss, wanted = exact_run(exact, case, gated)
    loss, found = fast_run(model, case, gated)
    assert abs(loss - wanted_loss) <= LOSS_TOLERANCE * abs(wanted_loss)
    assert len(found) == 2 * len(ALL_LINEAR) * 3
    assert_gradients_equal(found, wanted, TOLERANCE)


def test_a_quantized_head_is_refused():
    model = causal_lm()
    model.lm_head = FourBit(model.lm_head)
    with pytest.raises(
        ValueError, match="head is a FourBit, not a plain Linear; leave lm_head out"
    ):
        gate_layers(model)


def own_forwards(model: nn.Module) -> dict[str, int]:
    return {n: id(m.forward) for n, m in model.named_modules() if "forward" in vars(m)}


def test_what_accelerate_puts_around_modules_on_one_device_stays_in_use():
    """As it does for a quantized model that is loaded with a device_map."""
    case, plain = text_case([[20], [13]]), causal_lm()
    hooked = dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
    before = own_forwards(hooked)
    calls = []
    hook = hooked.model.layers[1]._hf_hook
    pre_forward = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: calls.append(1) or pre_forward(*args, **kwargs)
    gate_layers(plain)
    attachment = gate_layers(hooked)
    results = []
    for model in (plain, hooked, copy.deepcopy(hooked)):
        case.run(model).loss_sum.backward()
        results.append(gradients(model))
    assert calls
    for found in results[1:]:
        assert all(torch.equal(found[name], grad) for name, grad in results[0].items())
    attachment.remove()
    assert own_forwards(hooked) == before


def test_a_model_on_several_devices_or_on_none_is_refused(tmp_path: Path):
    parts = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="parts of the model are offloaded, by device_map"):
        gate_layers(dispatch_model(causal_lm(), parts, offload_dir=tmp_path))
    split = dispatch_model(causal_lm(), {"": "cpu"}, force_hooks=True)
    split.model.layers[2]._hf_hook.execution_device = "cuda:1"
    with pytest.raises(ValueError, match=r"lies on 2 devices of one process \(cpu, cuda:1\)"):
        gate_layers(split)
