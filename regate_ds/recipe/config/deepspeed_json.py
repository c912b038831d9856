"""Merge the run's settings into the user's own DeepSpeed JSON.

A key that only one side sets is taken. Where both set it they must agree; "auto" takes ours.
The engine builds optimizer and schedule and gives them to ``deepspeed.initialize``, so the merged
settings have neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from regate_ds.recipe.optimizer import OptimizerConfig

AUTO = "auto"

Setting = tuple[str, object, str]
"""Dotted key in the JSON, our value, name of our key."""

_SCHEDULERS = {"cosine": "WarmupCosineLR", "constant": "WarmupLR"}


class Trained(Protocol):
    """What the settings are merged from: the configuration of `regate train`, or of `pretrain`."""

    @property
    def run(self) -> Any: ...

    @property
    def optimizer(self) -> OptimizerConfig: ...


def deepspeed_config(config: Trained, world_size: int) -> dict[str, Any]:
    """Return the dict for ``deepspeed.initialize`` on ``world_size`` data ranks.

    ValueError names both values where the JSON and our YAML disagree.
    """
    user = _read_user(config.run.deepspeed)
    _refuse_other_precision(user)
    _require_zero_stage(user)
    _require_same_optimizer(user.pop("optimizer", AUTO), config.optimizer)
    _require_same_scheduler(user.pop("scheduler", AUTO), config.optimizer)
    merged = _take(user, _run_settings(config, world_size))
    return _without_auto(merged)


def zero_stage(settings: Mapping[str, Any]) -> int:
    """Return the stage of merged settings; DeepSpeed's own default is 0."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def _run_settings(config: Trained, world_size: int) -> list[Setting]:
    run, clip = config.run, config.optimizer.grad_clip
    samples = run.micro_batch * run.accumulation * world_size
    is_bf16 = run.precision == "bf16"
    return [
        ("train_micro_batch_size_per_gpu", run.micro_batch, "run.micro_batch"),
        ("gradient_accumulation_steps", run.accumulation, "run.accumulation"),
        ("train_batch_size", samples, f"run.micro_batch * run.accumulation * {world_size} ranks"),
        ("gradient_clipping", 0.0 if clip is None else clip, "optimizer.grad_clip"),
        ("bf16.enabled", is_bf16, f"run.precision={run.precision}"),
        ("fp16.enabled", False, f"run.precision={run.precision}"),
    ]


def _read_user(source: Path | dict[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {"zero_optimization": {"stage": 0}}
    if isinstance(source, dict):
        return json.loads(json.dumps(source))
    try:
        user = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"run.deepspeed={source}: cannot be read: {error.strerror}; name a JSON file"
        ) from None
    except ValueError as error:
        raise ValueError(f"run.deepspeed={source}: not JSON: {error}; correct the file") from None
    if not isinstance(user, dict):
        raise ValueError(
            f"run.deepspeed={source}: holds a {type(user).__name__}; it must hold a JSON object"
        )
    return user


def _refuse_other_precision(user: dict[str, Any]) -> None:
    if "bfloat16" in user:
        raise ValueError("run.deepspeed: bfloat16 is DeepSpeed's old name; write bf16")
    for key in ("amp", "torch_autocast"):
        if isinstance(user.get(key), Mapping) and user[key].get("enabled"):
            raise ValueError(
                f"run.deepspeed: {key}.enabled=True is not supported; "
                f"remove it and set run.precision to fp32 or bf16"
            )


def _require_zero_stage(user: dict[str, Any]) -> None:
    zero = _keys("zero_optimization", user.get("zero_optimization", {}))
    stage = zero.get("stage", 0)
    if stage != AUTO and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise ValueError(
            f"run.deepspeed: zero_optimization.stage={stage!r}: must be one of 0, 1, 2, 3"
        )
    if zero.get("offload_optimizer") not in (None, AUTO):
        # DeepSpeed would refuse torch.optim.AdamW there, and demand its own Adam for CPUs.
        user.setdefault("zero_force_ds_cpu_optimizer", False)


def _take(user: dict[str, Any], settings: list[Setting]) -> dict[str, Any]:
    for key, ours, name in settings:
        *parents, last = key.split(".")
        node = user
        for parent in parents:
            node = _keys(parent, node.setdefault(parent, {}))
        _require_same(key, node.get(last, AUTO), ours, name)
        node[last] = ours
    return user


def _keys(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"run.deepspeed: {name}={value!r}: must hold keys")
    return value


def _require_same_optimizer(theirs: Any, ours: OptimizerConfig) -> None:
    if theirs == AUTO:
        return
    theirs = _keys("optimizer", theirs)
    _require_same(
        "optimizer.type", theirs.get("type", AUTO), "AdamW", "the optimizer of the recipe"
    )
    known = {
        "lr": (ours.lr, "optimizer.lr"),
        "betas": (list(ours.betas), "optimizer.betas"),
        "eps": (ours.eps, "optimizer.eps"),
        "weight_decay": (ours.weight_decay, "optimizer.weight_decay"),
        "torch_adam": (True, "the recipe, which uses torch.optim.AdamW"),
        "adam_w_mode": (True, "the recipe, which uses torch.optim.AdamW"),
    }
    _require_same_params("optimizer", theirs.get("params", {}), known)


def _require_same_scheduler(theirs: Any, ours: OptimizerConfig) -> None:
    if theirs == AUTO:
        return
    theirs = _keys("scheduler", theirs)
    name = f"optimizer.schedule={ours.schedule}"
    _require_same("scheduler.type", theirs.get("type", AUTO), _SCHEDULERS[ours.schedule], name)
    known = {
        "warmup_max_lr": (ours.lr, "optimizer.lr"),
        "warmup_min_lr": (0, "the recipe's warm-up, which starts at 0"),
        "warmup_type": ("linear", "the recipe's warm-up"),
        "warmup_num_steps": (ours.warmup_steps, "optimizer.warmup_steps"),
        "cos_min_ratio": (ours.min_lr_share, "optimizer.min_lr_share"),
    }
    _require_same_params("scheduler", theirs.get("params", {}), known)


def _require_same_params(section: str, theirs: Any, ours: Mapping[str, tuple[object, str]]) -> None:
    for key, value in _keys(f"{section}.params", theirs).items():
        if value == AUTO:
            continue
        if key not in ours:
            raise ValueError(
                f"run.deepspeed: {section}.params.{key}={value!r} has no counterpart in "
                f'optimizer.*; remove it or set it to "{AUTO}"'
            )
        _require_same(f"{section}.params.{key}", value, *ours[key])


def _require_same(key: str, theirs: object, ours: object, name: str) -> None:
    if theirs != AUTO and theirs != ours:
        raise ValueError(
            f"run.deepspeed: {key}={theirs!r} disagrees with {ours!r} ({name}); "
            f'change one, or write "{AUTO}" in the DeepSpeed JSON'
        )


def _without_auto(value: Any) -> Any:
    """Remove the remaining "auto" values, so that DeepSpeed's own defaults stand there."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != AUTO}
    return value
