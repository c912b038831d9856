"""Refuse settings, ranks and students that a run through Megatron-core cannot take.

Nothing here imports Megatron-core, so that a run is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from regate_ds.families.table import FAMILIES
from regate_ds.families.text_decoders import decoders_that

MEGATRON_STUDENTS = tuple(name for name, family in FAMILIES.items() if family.in_megatron)
"""`model_type` of the students that can be trained through Megatron-core."""

Problem = tuple[bool, str]
"""Whether there is a problem, and the error message for it."""


def require_settings(config: Any) -> None:
    """Refuse, by ValueError, settings of a RunConfig that cannot be combined with `parallel`."""
    _refuse(_settings_problems(config))


def require_packages(parallel: Any) -> None:
    """Refuse, by ValueError, a run whose packages are not installed."""
    _refuse(
        [
            (
                not is_installed("megatron"),
                "parallel.*: megatron-core is not installed; pip install 'regate-ds[megatron]', or "
                "set parallel=null",
            ),
            (
                parallel.row_format == "ragged" and not is_installed("transformer_engine"),
                "parallel.row_format=ragged: its attention is Transformer Engine's, which is not "
                "installed; install it, or set parallel.row_format=padded",
            ),
            (
                parallel.context > 1 and not is_installed("transformer_engine"),
                f"parallel.context={parallel.context}: its attention is Transformer Engine's, "
                "which is not installed; install it, or set parallel.context=1",
            ),
        ]
    )


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def num_experts(text: Any) -> int:
    """Return the experts of each layer; 0 in a decoder without them."""
    return getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0)


def inner_size(text: Any) -> int:
    """Return the width inside an MLP; in a decoder with experts, inside each of them."""
    own = getattr(text, "moe_intermediate_size", None) if num_experts(text) else None
    return own or text.intermediate_size


def require_ranks(parallel: Any, world_size: int) -> None:
    """Refuse, by ValueError, a number of ranks that does not hold whole copies of the model."""
    size = parallel.ranks_per_copy
    _refuse(
        [
            (
                world_size % size != 0,
                f"parallel.tensor={parallel.tensor} times parallel.pipeline={parallel.pipeline} "
                f"times parallel.context={parallel.context} is {size} ranks for one copy of the "
                f"model, but the job has {world_size}; start it on a multiple of {size} ranks",
            ),
            (
                world_size // parallel.pipeline % parallel.expert != 0,
                f"parallel.expert={parallel.expert} must divide the ranks of a stage, of which the "
                f"job has {world_size // parallel.pipeline}; set it to a divisor",
            ),
        ]
    )


def require_student(model_type: str, text: Any, parallel: Any) -> None:
    """Refuse, by ValueError, a student that cannot be cut as ``parallel`` says.

    ``text`` is the Hugging Face config of its decoder.
    """
    if model_type not in MEGATRON_STUDENTS:
        raise ValueError(
            f"a {model_type} student cannot be trained with parallel.*; use one of "
            f"{MEGATRON_STUDENTS}, or set parallel=null"
        )
    require_decoder(text)
    _refuse(_size_problems(text, parallel))


def require_decoder(text: Any) -> None:
    """Refuse, by ValueError, a decoder that Megatron-core would compute differently."""
    _refuse(_decoder_problems(text))


def _refuse(problems: Iterator[Problem] | list[Problem]) -> None:
    for is_problem, message in problems:
        if is_problem:
            raise ValueError(message)


def _settings_problems(config: Any) -> Iterator[Problem]:
    parallel, model, run = config.parallel, config.model, config.run
    advice = "cannot be combined with parallel.*; set it to"
    yield (
        config.scores_online and config.teacher.sharding != "none",
        f"teacher.sharding={config.teacher.sharding} {advice} none while teacher.mode=online",
    )
    packs = config.data.pack_length is not None
    yield (
        packs and parallel.row_format != "ragged",
        f"data.pack_length={config.data.pack_length} needs parallel.row_format=ragged, as padded "
        "rows cannot keep samples apart; set it, or data.pack_length to null",
    )
    yield run.deepspeed is not None, f"run.deepspeed={run.deepspeed} {advice} null"
    yield (
        model.gradient_checkpointing,
        f"model.gradient_checkpointing=True {advice} false, and parallel.recompute to full",
    )
    yield (
        model.path is None and model.kind not in MEGATRON_STUDENTS,
        f"model.kind={model.kind} {advice} {' or '.join(MEGATRON_STUDENTS)}",
    )
    yield (
        config.elision.last_layer is not None and parallel.virtual > 1,
        f"elision.last_layer={config.elision.last_layer} cannot be combined with "
        f"parallel.virtual={parallel.virtual}; set it to null, or parallel.virtual to 1",
    )
    yield (
        parallel.virtual > 1 and run.accumulation % parallel.pipeline != 0,
        f"run.accumulation={run.accumulation}: with parallel.virtual={parallel.virtual} it must "
        f"be a multiple of parallel.pipeline={parallel.pipeline}",
    )


def _decoder_problems(text: Any) -> Iterator[Problem]:
    decoders = decoders_that("in_megatron")
    kind, rope = text.model_type, text.rope_parameters.get("rope_type", "default")
    yield (
        kind not in decoders,
        f"decoder {kind!r} is not supported with Megatron-core; use a student with one of "
        f"{decoders}",
    )
    yield (
        rope != "default",
        f"rope_type={rope!r} is not supported with Megatron-core; use a student with plain rotary "
        "positions",
    )
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        value = getattr(text, name, False)
        yield (
            bool(value),
            f"{name}={value} in the decoder's config is not supported with Megatron-core; use "
            "another student",
        )
    window = getattr(text, "sliding_window", None)
    yield (
        window is not None,
        f"sliding_window={window} in the decoder's config is not supported with Megatron-core; "
        "use another student",
    )
    yield (
        getattr(text, "output_router_logits", False),
        "output_router_logits=True asks for the experts' auxiliary loss, which is not added to "
        "the loss of kept tokens; set it false in the student's config.json",
    )
    yield (
        num_experts(text) > 0 and text.num_experts_per_tok == 1,
        "num_experts_per_tok=1 is not supported with Megatron-core, whose router would weigh the "
        "expert of a token otherwise; use a student with more",
    )
    step, plain = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", None)
    yield (
        num_experts(text) > 0 and (step != 1 or bool(plain)),
        f"decoder_sparse_step={step} with mlp_only_layers={plain} leaves layers without experts, "
        "which is not supported with Megatron-core; use a student with experts in every layer",
    )
    noise = getattr(text, "router_jitter_noise", 0.0)
    yield (
        noise != 0.0,
        f"router_jitter_noise={noise} is not supported with Megatron-core; set it to 0 in the "
        "student's config.json",
    )
    yield (
        text.hidden_act != "silu",
        f"hidden_act={text.hidden_act!r} is not supported with Megatron-core; use a student with "
        "'silu'",
    )


def _size_problems(text: Any, parallel: Any) -> Iterator[Problem]:
    parts = parallel.pipeline * parallel.virtual
    yield (
        text.num_hidden_layers % parts != 0,
        f"the student's {text.num_hidden_layers} layers cannot be cut into {parts} equal parts "
        "(parallel.pipeline times parallel.virtual); choose two whose product divides the layers",
    )
    experts = num_experts(text)
    yield (
        parallel.expert > 1 and not experts,
        f"parallel.expert={parallel.expert}: the student's decoder {text.model_type!r} has no "
        "experts; set parallel.expert to 1",
    )
    yield (
        experts % parallel.expert != 0,
        f"the student's {experts} experts cannot be shared by parallel.expert={parallel.expert} "
        f"ranks; set parallel.expert to a divisor of {experts}",
    )
    yield (
        experts > 0 and parallel.tensor > 1 and not parallel.sequence,
        f"parallel.tensor={parallel.tensor}: a student with experts needs the sequence cut, too; "
        "set parallel.sequence=true",
    )
    heads = ("num_attention_heads", "num_key_value_heads", "vocab_size")
    sizes = {name: getattr(text, name) for name in heads}
    own = inner_size(text) != text.intermediate_size
    sizes["moe_intermediate_size" if own else "intermediate_size"] = inner_size(text)
    for name, value in sizes.items():
        yield (
            value % parallel.tensor != 0,
            f"the student's {name}={value} cannot be cut over parallel.tensor="
            f"{parallel.tensor} ranks; set parallel.tensor to a divisor of {value}",
        )
