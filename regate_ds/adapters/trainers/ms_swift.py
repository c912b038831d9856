"""ReGATE in ms-swift's supervised fine-tuning: a plugin file, and one argument of the command.

    swift sft --external_plugins regate_plugin.py ...

    # regate_plugin.py
    install_in_swift(RegateConfig(), reference=Scored("store"))

ms-swift reads the plugin before it loads anything, and takes its trainer from a table, where ours
stands then. Tasks whose trainer is another, and settings that would train wrongly, are refused by
name.

Tested with ms-swift 4.6.0 (transformers 5.19.0).
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

from swift.model.models import qwen
from swift.template import Template
from swift.template.templates.qwen import Qwen2VLTemplate, Qwen3VLTemplate
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from transformers import Trainer

from regate_ds.adapters.computed import Reference
from regate_ds.adapters.huggingface.wishes import Wishes
from regate_ds.adapters.trainers.hf_trainer import NAME, RegateMixin
from regate_ds.adapters.trainers.limits import refuse
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.window import PLAN
from regate_ds.config import RegateConfig, require_config
from regate_ds.data.keyed import Keyed
from regate_ds.stores.image_orders.reader import ImageOrderStore

_HOST = "ms-swift"

TASK = "causal_lm"
"""The task whose trainer elides."""

_LEFT_TO_THE_MODEL = tuple(
    kind._post_encode for kind in (Template, Qwen2VLTemplate, Qwen3VLTemplate)
)
"""Hooks before the forward that do nothing, or what the model's forward does: images among words.

That forward does it in their place, as the hook keeps a plan and the words' ids from it."""

_TEXT_POSITIONS = "text_position_ids"
"""What ms-swift adds for rows of several samples; a row with a plan has one."""

make_trainer: Any = None
"""What ms-swift calls to make the trainer, once it is installed."""


def is_mixed_data(method: Any) -> bool:
    """Return whether ms-swift has put this on a Qwen3-VL, for batches of text under DeepSpeed.

    Elsewhere it calls the model's own.
    """
    return getattr(getattr(method, "__func__", None), "__module__", "") == qwen.__name__


class RegateSwiftTrainer(RegateMixin, Seq2SeqTrainer):
    """ms-swift's trainer of ``swift sft``, with ``regate``, ``reference`` and ``orders``."""

    keyed_by_user = ""
    _host_class = Seq2SeqTrainer
    _wishes = Wishes(may_displace=is_mixed_data)

    def _make_ready(self: Any) -> None:
        _require_supported(self)
        self.train_dataset = Keyed(_without_replacement(self.train_dataset), NAME)
        self.template.register_post_encode_hook = _register_none

    def _prepare_inputs(self: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if PLAN not in inputs:
            return super()._prepare_inputs(inputs)
        # Past ms-swift's own, which picks the logits of labels that the plan has.
        ready = Trainer._prepare_inputs(self, inputs)
        return {name: value for name, value in ready.items() if name != _TEXT_POSITIONS}


def install_in_swift(
    regate: RegateConfig,
    *,
    reference: Reference | Scored | None = None,
    orders: ImageOrderStore | None = None,
) -> None:
    """Make ``swift sft`` follow plans, for the rest of the process; called in a plugin file.

    The arguments are those of ``RegateMixin``. ValueError in Megatron-SWIFT, RuntimeError if it is
    installed already.
    """
    global make_trainer
    require_config("regate", regate)
    if make_trainer is not None:
        raise RuntimeError("elision is installed in ms-swift already; install it once a process")
    refuse(
        {
            "Megatron-SWIFT, whose trainer is another; use swift sft": any(
                name.startswith("swift.megatron") for name in sys.modules
            )
        },
        _HOST,
    )
    made = partial(RegateSwiftTrainer, regate=regate, reference=reference, orders=orders)
    make_trainer = made
    table = TrainerFactory.TRAINER_MAPPING
    table[TASK] = f"{__name__}.make_trainer"
    if regate.enabled:
        table.update(dict.fromkeys(table.keys() - {TASK}, f"{__name__}.refuse_task"))


def refuse_task(args: Any, **_: Any) -> None:
    """Stand in the table for the trainers of other tasks."""
    task = getattr(args, "rlhf_type", None) or args.task_type
    refuse(
        {f"task {task!r}, whose trainer is another; use swift sft, task_type={TASK}": True}, _HOST
    )


def _register_none(models: Any) -> None:
    """Stand for a template's function that puts its hook before the models' forward."""


def _without_replacement(dataset: Any) -> Any:
    """Return a data set that refuses a sample it cannot encode, where ms-swift would take another
    in its place, under its name."""
    if hasattr(dataset, "n_try_fetch"):
        dataset = copy.copy(dataset)
        dataset.n_try_fetch, dataset.strict = 1, True
    return dataset


def _require_supported(trainer: Any) -> None:
    args, template = trainer.args, trainer.template
    kind = type(template)
    refuse(
        {
            f"template {kind.__name__}, whose hook puts images among the words before the model is "
            "called; use a model without one, as LLaVA or Qwen-VL": (
                kind._post_encode not in _LEFT_TO_THE_MODEL
            ),
            f"DeepSpeed and template {kind.__name__}, where ms-swift's own forward puts images "
            "among the words; use DDP": (
                kind._post_encode is Qwen3VLTemplate._post_encode and trainer.is_deepspeed_enabled
            ),
            "packing=True, whose rows hold several samples; set it False": template.packing,
            "padding_free=True, which joins the rows of a batch; set it False": (
                template.padding_free
            ),
            f"sequence_parallel_size={template.sequence_parallel_size}, which cuts samples over "
            "ranks; set it 1": template.sequence_parallel_size > 1,
            "loss_scale, whose weights of single tokens elision would not read; use one of 0 and 1 "
            "only, as default, last_round or all": not template.loss_scale.is_binary_loss_scale,
            **{
                f"{name}=True, a loss that elision would not compute; set it False": (
                    getattr(args, name)
                )
                for name in ("enable_dft_loss", "enable_channel_loss")
            },
            f"router_aux_loss_coef={args.router_aux_loss_coef}, the load-balancing loss of the "
            "experts, which a plan would drop; set it to 0": bool(args.router_aux_loss_coef),
            "tuner_backend='unsloth', which replaces the forward that elision wraps; use peft": (
                args.tuner_backend == "unsloth"
            ),
        },
        _HOST,
    )
