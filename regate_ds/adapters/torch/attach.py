"""Attach ReGATE to a model for a training loop of your own; `loop.py` has what is returned."""

from __future__ import annotations

from torch import nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.computed import Computed, Reference
from regate_ds.adapters.huggingface.empty_image import has_tower
from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.huggingface.tower_calls import tower_calls_of
from regate_ds.adapters.huggingface.wishes import NO_WISHES, Wishes
from regate_ds.adapters.torch.checks import LoopOptions, warn_if_never_sparse
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.config import RegateConfig, require_config, require_steps
from regate_ds.families.numbering import numbering_of
from regate_ds.families.table import find_family
from regate_ds.parallel.layout import num_ranks
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.teacher.online import OnlineReference


def attach(  # noqa: PLR0913 (a user's call: each argument by its name)
    model: nn.Module,
    config: RegateConfig,
    *,
    total_steps: int | None = None,
    reference: Reference | None = None,
    orders: ImageOrderStore | None = None,
    own_loss: bool = False,
    wishes: Wishes = NO_WISHES,
) -> LoopRegate:
    """Make the model accept plans. Call it before the host wraps the model: before
    ``deepspeed.initialize``, ``accelerator.prepare``, ``DistributedDataParallel`` or
    ``fully_shard``, and on several ranks after they have joined.

    total_steps: optimizer steps of the whole run; a resume must repeat it.
    reference: the teacher's losses of the training set, or a ``Teacher(...).online()`` that finds
        them while training; only scores that read it need it.
    orders: the orders of the training set's image tokens; only rankings that read them need them.
    own_loss: allows ``token_losses``, for users who weigh the losses themselves.
    wishes: what the adapter of a trainer asks for; not for users.

    ValueError names what is not supported. With enabled=False the model is not changed.
    """
    require_config("config", config)
    computed = Computed(reference, orders)
    if isinstance(reference, OnlineReference):
        reference.require_frozen(model)
    if config.enabled:
        computed.require(config, online=True)
        if total_steps is not None:
            require_steps(total_steps)
    warn_if_never_sparse(config, total_steps)
    attachment, several_ranks = Attachment(), num_ranks() > 1
    if config.enabled:
        attachment = attach_model(
            model,
            config,
            own_loss=own_loss,
            run_tower_without_image=several_ranks,
            wishes=wishes,
        )
    family = find_family(model)
    # On several ranks such a model runs its tower on an empty image where a micro-batch has none.
    tower_unwatched = not several_ranks and has_tower(model)
    options = LoopOptions(
        model=model,
        own_loss=own_loss,
        tower_unwatched=tower_unwatched,
        runs_by_image=family is not None and family.runs_by_image,
        tower_calls=tower_calls_of(model),
        number_images=numbering_of(model, elides_images=config.chooses_images),
    )
    return LoopRegate(
        config, attachment, total_steps=total_steps, computed=computed, options=options
    )
