"""ReGATE in TRL's ``SFTTrainer``: one base class and two arguments.

    trainer = RegateSFTTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=processor,
        regate=RegateConfig(), reference=Scored("store"),
    )

For an SFTTrainer of your own: ``class MyTrainer(RegateSFTMixin, MySFTTrainer)``. TRL prepares the
data set itself; samples are named by their place in what it has prepared.

TRL has put a forward of its own on the model's instance, whose head computes log-probabilities in
tiles. Elision displaces it: calls with a plan pass it by, calls without one (evaluation) reach it,
and ``trainer.regate.remove()`` puts it back. TRL's ``compute_loss`` still runs, for what it logs
(entropy, accuracy, number of tokens); the loss is elision's.

Tested with trl 1.16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from regate_ds.adapters.computed import Reference
from regate_ds.adapters.huggingface.wishes import Wishes
from regate_ds.adapters.trainers.hf_trainer import NAME, RegateMixin
from regate_ds.adapters.trainers.limits import refuse
from regate_ds.adapters.trainers.packed import PackedRows, collate_alone
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.trainers.state import group_of
from regate_ds.adapters.window import PLAN
from regate_ds.data.keyed import Keyed


def is_fused_forward(forward: Any) -> bool:
    """Return whether TRL's ``add_fused_lm_head`` has made this forward."""
    function = getattr(forward, "__func__", None)
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    is_named = code is not None and code.co_name == "_fused_forward"
    return is_named and names.get("__name__") == "trl.trainer.utils"


class RegateSFTMixin(RegateMixin):
    """Add ReGATE to an SFTTrainer class: name this one before it among your base classes."""

    keyed_by_user = ""
    _host_class = SFTTrainer
    _wishes = Wishes(observes=True, may_displace=is_fused_forward)

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if PLAN not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        call = _PlannedCall(model)
        # Past RegateMixin: TRL's own, which calls the model and logs what it returned.
        super(RegateMixin, self).compute_loss(call, inputs, **kwargs)
        loss = self._loss_of(call.output)
        return (loss, call.output) if return_outputs else loss

    def _make_ready(self: Any) -> None:
        args = self.args
        refuse(
            {
                f"loss_type={args.loss_type!r}, as elision computes the nll of kept targets "
                "itself; set loss_type='nll'": args.loss_type != "nll",
                f"router_aux_loss_coef={self.router_aux_loss_coef}, the load-balancing loss of the "
                "experts, which a plan would drop; set it to 0.0 in SFTConfig": (
                    self.aux_loss_enabled
                ),
                "activation_offloading=True, which hooks into the head that elision replaces; set "
                "it False": args.activation_offloading,
            },
            "SFTTrainer",
        )
        rows = PackedRows if self.padding_free else Keyed
        self.train_dataset = rows(self.train_dataset, NAME)

    def _losses_of(self: Any, scored: Scored) -> Reference:
        if not self.padding_free:
            return super()._losses_of(scored)
        return scored.compute(self, self.train_dataset.samples, collate_alone, group_of(self))


class RegateSFTTrainer(RegateSFTMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` with the arguments ``regate``, ``reference`` and ``orders``."""


class _PlannedCall:
    """The model, as TRL's ``compute_loss`` calls it: its output has what is logged."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, *, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
        self.output = self._model(**inputs)
        losses_L = self.output.losses.detach()
        return FusedCausalLMOutput(
            log_probs=-losses_L,
            entropy=self.output.entropy,
            is_top1=self.output.is_top1,
            label_mask=torch.ones_like(losses_L, dtype=torch.bool),
        )
