"""The page of models says what the rows say, and is not made of wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import page as made
from tests.families.uses import USES

USED = {use.name: "exact" for use in USES}
IN_ELIDE = {"runs": 3, "gradient_error": 1e-14, "accepted": True}


def row(family: str, name: str, verdict: str = "exact", **more: Any) -> dict[str, Any]:
    return {"family": family, "class": name, "verdict": verdict, **more}


def parts() -> dict[str, list[dict[str, Any]]]:
    llava, llama = "LlavaForConditionalGeneration", "LlamaForCausalLM"
    seen = {"images": True, "empty_image": "yes", "told_apart": "no", "decoder": "llama"}
    elide = [
        row("llava over llama", llava, **IN_ELIDE, **seen, uses=USED),
        row("llama", llama, **IN_ELIDE, images=False, decoder="llama", uses=USED),
        row("mamba", "MambaForCausalLM", "refused", accepted=False, reason="it has a state"),
        row("mamba2", "Mamba2ForCausalLM", "refused", accepted=False, reason="it has a state"),
        row("fuyu", "FuyuForCausalLM", "refused", accepted=False, reason="nobody knows it"),
    ]
    mlp_only = [row("llava over llama", llava), row("llama", llama, "refused", accepted=False)]
    zero = [row("llava over llama", llava, stage=stage) for stage in (2, 3)]
    return {"elide": elide, "mlp_only": mlp_only, "zero": zero, "teachers": [row("llama", llama)]}


@pytest.fixture(autouse=True)
def _of_few_classes(monkeypatch):
    monkeypatch.setattr(made, "HOSTS", {})


def test_each_class_has_a_line_with_what_was_proven():
    lines = made.page(parts()).splitlines()
    assert (
        "| LlavaForConditionalGeneration | llama | 3 | exact | exact | exact | exact | - "
        "| yes | no | 2, 3 |"
    ) in lines
    assert "| LlamaForCausalLM | llama | 3 | exact | exact | exact | refused | exact |" in lines


def test_refused_classes_stand_under_their_reason_those_with_images_apart():
    images, text = made.page(parts()).split("### With images")[1].split("### Of text")
    assert "| nobody knows it | FuyuForCausalLM |" in images
    assert "| it has a state | Mamba2ForCausalLM, MambaForCausalLM |" in text


def test_what_a_host_cannot_do_is_named_with_its_error():
    rows = parts()
    fault = {**USED, "reentrant checkpointing": "host: TypeError: no"}
    rows["elide"][1] = {**rows["elide"][1], "uses": fault}
    found = made.page(rows)
    assert "| LlamaForCausalLM | llama | 3 | exact | host: reentrant checkpointing |" in found
    assert "| reentrant checkpointing | TypeError: no | LlamaForCausalLM (llama) |" in found


@pytest.mark.parametrize("part", made.PARTS)
def test_no_page_is_made_of_a_wrong_row(part: str):
    rows = parts()
    rows[part][0]["verdict"] = "wrong"
    with pytest.raises(ValueError, match=f"{part}: these are accepted, but not exact"):
        made.page(rows)
