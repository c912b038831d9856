"""Which decoder a class of transformers may hold, and what that class does around it.

Support is keyed by both: the same decoder is right in one class and wrong in another, which scales
its logits or lets image tokens see each other. A class that has no line here is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from regate_ds.algorithm.loss import UNCHANGED, LogitChange
from regate_ds.families.text_decoders import (
    CHANGES_ALONE,
    TEXT_DECODERS,
    ChangeOf,
    capped,
    inversely_scaled,
    scaled,
)

Packs = Literal["any", "text", "none"]
"""Which samples may share a row: any, those without images, or none."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a class with a language modelling head does around its decoder's layers."""

    decoders: tuple[str, ...]
    """``model_type`` of the decoders that it may hold."""

    change: ChangeOf | None = None
    """What it does to the logits; None if nothing."""

    token_inputs: tuple[str, ...] = ()
    """Names of further arguments that it hands on to the layers, with a row for each token."""

    marks: tuple[str, ...] = ()
    """Inputs without which it takes image tokens for text, and says nothing."""

    two_way: bool = False
    """Whether some of its tokens see later ones, so that its own mask decides in every layer."""

    packs: Packs = "any"
    """Which samples its own masks keep apart in a row. Those of Gemma 3 and 4 misplace, in layers
    with a window, the images of all samples but the row's first (transformers 5.24)."""

    deepstack: bool = False
    """Whether its decoder adds features of the image between its layers."""


def _scaled_and_capped(text: Any) -> LogitChange:
    return LogitChange(scale=text.output_multiplier, cap=text.final_logit_softcapping)


_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "phi3")
"""Decoders of classes that take any, as they neither scale nor cap. All were tested in LLaVA, and
each class with one of them at least; docs/models.md has the pairs that were run."""

_ANY = Host(decoders=_LLAMAS)

_LISTED = "docs/models.md lists what was tested: use one of these, or see docs/add_a_model.md"

_MARKS = ("mm_token_type_ids",)
"""Marks of image tokens; some hosts hand them on to layers that do not read them."""

_DELTA = ("qwen3_5_text",)

HOSTS: dict[str, Host] = {
    "AriaForConditionalGeneration": Host(decoders=("aria_text",)),
    "AyaVisionForConditionalGeneration": Host(decoders=("cohere2",)),
    "Cohere2VisionForConditionalGeneration": Host(decoders=("cohere2",)),
    "Cosmos3EdgeForConditionalGeneration": Host(decoders=("cosmos3_edge_text",)),
    "Cosmos3OmniForConditionalGeneration": Host(decoders=("qwen3_vl_text",), deepstack=True),
    "DeepseekVLForConditionalGeneration": _ANY,
    "DeepseekVLHybridForConditionalGeneration": _ANY,
    "Ernie4_5_VLMoeForConditionalGeneration": Host(
        decoders=("ernie4_5_vl_moe_text",), marks=("moe_mm_token_type_ids",)
    ),
    "Exaone4_5_ForConditionalGeneration": Host(decoders=("exaone4",), token_inputs=_MARKS),
    "Gemma3ForConditionalGeneration": Host(
        decoders=("gemma3_text",), marks=("token_type_ids",), two_way=True, packs="text"
    ),
    "Gemma4ForConditionalGeneration": Host(
        decoders=("gemma4_text",), change=capped, marks=_MARKS, two_way=True, packs="text"
    ),
    "Gemma4UnifiedForConditionalGeneration": Host(
        decoders=("gemma4_unified_text",),
        change=capped,
        marks=_MARKS,
        two_way=True,
        packs="text",
    ),
    "Glm46VForConditionalGeneration": Host(decoders=("glm4v_text",)),
    "Glm4vForConditionalGeneration": Host(decoders=("glm4v_text",)),
    "Glm4vMoeForConditionalGeneration": Host(decoders=("glm4v_moe_text",)),
    "GlmOcrForConditionalGeneration": Host(decoders=("glm_ocr_text",)),
    "GotOcr2ForConditionalGeneration": _ANY,
    "GraniteDoclingForConditionalGeneration": Host(
        decoders=("granite_docling_text",), change=inversely_scaled, deepstack=True
    ),
    "HunYuanVLForConditionalGeneration": Host(decoders=("hunyuan_vl_text",)),
    "HyperCLOVAXVisionV2ForConditionalGeneration": Host(
        decoders=("hyperclovax",), change=scaled("logits_scaling")
    ),
    "Idefics2ForConditionalGeneration": _ANY,
    "Idefics3ForConditionalGeneration": _ANY,
    "InternVLForConditionalGeneration": Host(decoders=(*_LLAMAS, "qwen3_moe", "gpt_oss")),
    "JanusForConditionalGeneration": _ANY,
    "Kimi_K25ForConditionalGeneration": Host(decoders=("deepseek_v3",)),
    "Lfm2VlForConditionalGeneration": Host(decoders=("lfm2",)),
    "Lfm3VlForConditionalGeneration": Host(decoders=("lfm3",)),
    "LightOnOcrForConditionalGeneration": Host(decoders=("qwen3",)),
    "LlavaForConditionalGeneration": Host(decoders=(*_LLAMAS, *_DELTA, "mixtral", "qwen3_moe")),
    "LlavaNextForConditionalGeneration": _ANY,
    "LlavaNextVideoForConditionalGeneration": _ANY,
    "LlavaOnevisionForConditionalGeneration": _ANY,
    "MiniCPMV4_6ForConditionalGeneration": Host(decoders=_DELTA),
    "MiniCPMV4_7ForConditionalGeneration": Host(decoders=_DELTA),
    "MiniMaxM3SparseForConditionalGeneration": Host(decoders=("minimax_m3_vl_text",)),
    "Mistral3ForConditionalGeneration": Host(decoders=("mistral", "ministral3")),
    "MuseGlimmerForConditionalGeneration": Host(
        decoders=("muse_glimmer_text",), change=_scaled_and_capped
    ),
    "Ovis2ForConditionalGeneration": _ANY,
    "PaddleOCRVLForConditionalGeneration": Host(decoders=("paddleocr_vl_text",)),
    "PaliGemmaForConditionalGeneration": Host(
        decoders=("gemma", "gemma2"), change=capped, marks=("token_type_ids",), two_way=True
    ),
    "Phi4MultimodalForCausalLM": Host(decoders=("phi4_multimodal",)),
    "QianfanOCRForConditionalGeneration": Host(decoders=("qwen3",)),
    "Qwen2VLForConditionalGeneration": Host(decoders=("qwen2_vl_text",)),
    "Qwen2_5OmniThinkerForConditionalGeneration": Host(
        decoders=("qwen2_5_omni_text",), token_inputs=_MARKS
    ),
    "Qwen2_5_VLForConditionalGeneration": Host(decoders=("qwen2_5_vl_text",), marks=_MARKS),
    "Qwen3OmniMoeThinkerForConditionalGeneration": Host(
        decoders=("qwen3_omni_moe_text",), token_inputs=_MARKS, deepstack=True
    ),
    "Qwen3VLForConditionalGeneration": Host(decoders=("qwen3_vl_text",), deepstack=True),
    "Qwen3VLMoeForConditionalGeneration": Host(decoders=("qwen3_vl_moe_text",), deepstack=True),
    "Qwen3_5ForConditionalGeneration": Host(decoders=_DELTA),
    "Qwen3_5MoeForConditionalGeneration": Host(decoders=("qwen3_5_moe_text",)),
    "SmolVLMForConditionalGeneration": _ANY,
    "Step3p7ForConditionalGeneration": Host(decoders=("step3p5",)),
    "VideoLlama3ForConditionalGeneration": _ANY,
    "VideoLlavaForConditionalGeneration": _ANY,
    "VipLlavaForConditionalGeneration": _ANY,
}
"""The classes that hold a decoder of another family, and those with images."""


@dataclass(frozen=True, kw_only=True)
class Supported:
    """What elision needs to know of one class around one decoder."""

    token_inputs: tuple[str, ...] = ()
    """Names of layer arguments with a row for each token, beside mask and rotary positions."""

    recurrent: tuple[str, ...] = ()
    """Types of layers that get no mask."""

    marks: tuple[str, ...] = ()
    """Inputs that must not be missing beside images."""

    own_mask: bool = False
    """Whether the host's own mask decides in every layer."""

    packs: Packs = "any"
    """Which samples may share a row."""

    deepstack: bool = False
    """Whether features of the image are added between layers."""

    change: LogitChange = UNCHANGED
    """What is done to the logits."""


def change_alone(text: Any) -> LogitChange:
    """Return what the class that has this decoder alone does to its logits."""
    change = CHANGES_ALONE.get(text.model_type)
    return UNCHANGED if change is None else change(text)


def supported(host: Any) -> Supported:
    """Return what is known of a model's class around its decoder.

    ValueError, with the way out, for a decoder or a class that no test has compared.
    """
    # A class of the user's own may be derived from one of transformers.
    names = [kind.__name__ for kind in type(host).__mro__ if _is_of_transformers(kind)]
    name, decoder = names[0] if names else type(host).__name__, host.get_decoder()
    if getattr(decoder, "config", None) is None:
        raise ValueError(f"{name} has no decoder with a configuration; {_LISTED}")
    found = supported_as(name, decoder.config)
    if not hasattr(decoder, "layers"):
        raise ValueError(f"{name} does not call its decoder's layers 'layers'; {_LISTED}")
    return found


def supported_as(name: str, text: Any) -> Supported:
    """The same from the class's name and the config of its text decoder."""
    decoder = TEXT_DECODERS.get(text.model_type)
    if decoder is None:
        raise ValueError(f"decoder {text.model_type!r} is not supported; {_LISTED}")
    around = _around(name, text.model_type)
    return Supported(
        token_inputs=(*decoder.token_inputs, *around.token_inputs),
        marks=around.marks,
        recurrent=decoder.recurrent,
        own_mask=decoder.own_mask or around.two_way,
        packs=around.packs if decoder.packs else "none",
        deepstack=around.deepstack,
        change=UNCHANGED if around.change is None else around.change(text),
    )


def _around(name: str, model_type: str) -> Host:
    mapping = import_module("transformers.models.auto.modeling_auto")
    around = HOSTS.get(name)
    if around is None and mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) == name:
        around = Host(decoders=(model_type,), change=CHANGES_ALONE.get(model_type))
    if around is None:
        raise ValueError(f"{name} is not supported; {_LISTED}")
    if model_type not in around.decoders:
        raise ValueError(
            f"{name} over a decoder {model_type!r} is not supported, only over "
            f"{around.decoders}: use one of these"
        )
    return around


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")
