"""The text decoders whose layers were tested, and what their layers are given beyond the usual.

The usual is one hidden tensor in and one out, an attention mask, and rotary positions. The decoder
of a multimodal model is looked up here by its own ``model_type``, not the model's. Which class of
transformers may stand around a decoder is in ``hosts.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regate_ds.algorithm.loss import LogitChange

ChangeOf = Callable[[Any], LogitChange]
"""Returns what a class does to its logits, from the config of its text decoder."""


@dataclass(frozen=True, kw_only=True)
class TextDecoder:
    """What a decoder can be used for. A decoder without a record is refused by name."""

    token_inputs: tuple[str, ...] = ()
    """Names of further layer arguments that have a row for each token."""

    recurrent: tuple[str, ...] = ()
    """Types of layers that carry a state from token to token. They are given no mask, so that a row
    may hold one sample only."""

    own_mask: bool = False
    """Whether the decoder's own mask says more than causal order, even in short rows."""

    packs: bool = True
    """Whether the decoder keeps the samples of one row apart; else rows of several are refused."""

    joins_keys: bool = True
    """Whether each layer hands to its cache the keys and values that it attends to, so that those
    of some rows can come from another run of the layer (`backward_only`)."""

    shards: bool = False
    """Whether DeepSpeed cuts the layers correctly, as our tests show (teacher/sharding)."""

    in_pipeline: bool = False
    """Whether the decoder was tested in DeepSpeed's pipeline."""

    in_megatron: bool = False
    """Whether the weights' names in Megatron-core are known."""

    has_qkv_bias: bool = False
    """Whether queries, keys and values have a bias; Megatron-core must be told."""

    has_qk_norm: bool = False
    """Whether the queries and keys of each head are normalized; Megatron-core must be told."""

    num_position_axes: int = 1
    """Number of rotary axes; an image has three in some families."""


@dataclass(frozen=True, kw_only=True)
class MlpBranch:
    """Names of a layer's modules from its residual to where the MLP is added to it.

    All work row by row, and nothing else reads what they return. A name that is None in the layer
    itself is left out.
    """

    norm: str | None = "post_attention_layernorm"
    """None if the branch begins at the MLP, as where mixer or residual have the same norm."""

    mlps: tuple[str, ...] = ("mlp",)
    """One, or some side by side, whose results are added up."""

    post_norm: str | None = None
    """Behind the MLP."""


_PLAIN = TextDecoder()

_DELTA_NET = TextDecoder(recurrent=("linear_attention",), packs=False)

_LATENT = TextDecoder(joins_keys=False)
"""It caches what keys and values are made of, or attends by a function of its own."""

_CONVOLUTION = TextDecoder(recurrent=("conv",), packs=False)

_LEAKING = TextDecoder(packs=False)
"""Its mask is made without position_ids: in the layers before the gate, samples of a row would see
each other."""

# fmt: off
_USUAL = (
    "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "cohere2_moe",
    "cwm", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt_neox", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "jais2",
    "jetmoe", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "nanochat", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2_moe", "sarvam_moe",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma",
)
# fmt: on

# fmt: off
_IN_HOSTS = (
    "cosmos3_edge_text", "glm4v_moe_text", "glm4v_text", "glm_ocr_text",
    "granite_docling_text", "muse_glimmer_text", "paddleocr_vl_text",
    "phi4_multimodal", "qwen2_5_omni_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    "qwen3_vl_text", "step3p5",
)
# fmt: on
"""Decoders that only multimodal models have."""

TEXT_DECODERS: dict[str, TextDecoder] = {
    **dict.fromkeys(_USUAL, _PLAIN),
    **dict.fromkeys(_IN_HOSTS, _PLAIN),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "diffllama"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"), _LATENT),
    "afmoe": _LEAKING,
    "bailing_hybrid": _DELTA_NET,
    "doge": TextDecoder(own_mask=True, joins_keys=False),
    "ernie4_5_vl_moe_text": TextDecoder(token_inputs=("moe_mm_token_type_ids",)),
    "gemma4_text": TextDecoder(token_inputs=("per_layer_input",)),
    "gpt_oss": _LEAKING,
    "granitemoehybrid": TextDecoder(recurrent=("mamba", "linear_attention"), packs=False),
    "hunyuan_vl_text": _LEAKING,
    "jamba": TextDecoder(recurrent=("mamba", "linear_attention"), packs=False),
    "lara_mini": _DELTA_NET,
    "lfm2": _CONVOLUTION,
    "lfm3": _CONVOLUTION,
    "llama": TextDecoder(shards=True, in_pipeline=True, in_megatron=True),
    # Its layers of full attention have the window.
    "minimax": TextDecoder(recurrent=("linear_attention",), own_mask=True, packs=False),
    "ministral3": TextDecoder(token_inputs=("position_ids",)),
    "mistral": TextDecoder(shards=True, in_pipeline=True),
    "mixtral": TextDecoder(in_megatron=True),
    "olmo_hybrid": _DELTA_NET,
    "qwen2": TextDecoder(shards=True, in_pipeline=True, in_megatron=True, has_qkv_bias=True),
    "qwen2_5_vl_text": TextDecoder(has_qkv_bias=True, num_position_axes=3),
    "qwen2_vl_text": TextDecoder(has_qkv_bias=True, num_position_axes=3),
    "qwen3": TextDecoder(in_megatron=True, has_qk_norm=True),
    "qwen3_5_moe_text": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_moe": TextDecoder(in_megatron=True, has_qk_norm=True),
    "qwen3_next": _DELTA_NET,
}
"""The records, by ``model_type``."""

_BEFORE_AND_AFTER = MlpBranch(
    norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"
)
_AFTER = MlpBranch(norm=None, post_norm="post_feedforward_layernorm")
_GLM = MlpBranch(post_norm="post_mlp_layernorm")
_SHARED = MlpBranch(mlps=("block_sparse_moe", "shared_mlp"))

MLP_BRANCHES: dict[str, MlpBranch] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "minimax", "phi"), MlpBranch(norm=None)),
    **dict.fromkeys(("exaone4", "flex_olmo", "olmo2", "olmo3"), _AFTER),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text"), _BEFORE_AND_AFTER),
    **dict.fromkeys(("gemma4_unified_text", "muse_glimmer_text"), _BEFORE_AND_AFTER),
    **dict.fromkeys(("glm4", "glm4v_text", "glm_ocr_text", "kolibri1"), _GLM),
    **dict.fromkeys(("granitemoe_swa", "granitemoehybrid", "granitemoeshared"), _SHARED),
    "afmoe": MlpBranch(norm="pre_mlp_layernorm", post_norm="post_mlp_layernorm"),
    "apertus": MlpBranch(norm="feedforward_layernorm"),
    "granitemoe": MlpBranch(mlps=("block_sparse_moe",)),
    "hyperclovax": MlpBranch(post_norm="post_norm2"),
    "jamba": MlpBranch(norm="pre_ff_layernorm", mlps=("feed_forward",)),
    "lfm2": MlpBranch(norm="ffn_norm", mlps=("feed_forward",)),
    "lfm3": MlpBranch(norm="ffn_norm", mlps=("feed_forward",), post_norm="post_ffn_norm"),
    "OlmoHybridAttentionDecoderLayer": _AFTER,
    "vaultgemma": MlpBranch(norm="pre_feedforward_layernorm"),
}
"""The branches that have other names than Llama's, by ``model_type`` or, where the layers of a
decoder differ, by their class."""

MLPS_OF_MARKS = ("ernie4_5_vl_moe_text",)
"""Decoders whose MLP reads marks of all tokens beside its rows, so that it cannot be gated."""


def branch_of(layer_class: str, model_type: str) -> MlpBranch:
    """Return the MLP branch of a class of layers. ValueError if it cannot be gated alone."""
    if model_type in MLPS_OF_MARKS:
        raise ValueError(
            f"decoder {model_type!r}: its MLP reads marks of all tokens, so that the MLP alone "
            "cannot be gated; use execution=elide"
        )
    return MLP_BRANCHES.get(layer_class) or MLP_BRANCHES.get(model_type, MlpBranch())


def decoders_that(ability: str) -> tuple[str, ...]:
    """Return the ``model_type`` of the decoders whose record's field ``ability`` is true."""
    return tuple(name for name, record in TEXT_DECODERS.items() if getattr(record, ability))


def scaled(name: str) -> ChangeOf:
    """Return what multiplies the logits by the config's number of that name."""
    return lambda text: LogitChange(scale=getattr(text, name))


def inversely_scaled(text: Any) -> LogitChange:
    """Return what Granite does to its logits."""
    return LogitChange(scale=1.0 / text.logits_scaling)


def capped(text: Any) -> LogitChange:
    """Return what Gemma does to its logits."""
    return LogitChange(cap=getattr(text, "final_logit_softcapping", None))


def _by_width(text: Any) -> LogitChange:
    return LogitChange(scale=text.dim_model_base / text.hidden_size)


CHANGES_ALONE: dict[str, ChangeOf] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), scaled("logit_scale")),
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa"), inversely_scaled),
    **dict.fromkeys(("granitemoehybrid", "granitemoeshared"), inversely_scaled),
    "hyperclovax": scaled("logits_scaling"),
    "minicpm3": _by_width,
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"), capped),
    **dict.fromkeys(("nanochat", "vaultgemma"), capped),
}
"""What the class with a decoder alone does to its logits."""
