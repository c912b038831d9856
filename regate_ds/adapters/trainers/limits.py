"""What transformers.Trainer can do and elision cannot: each is refused by name."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from regate_ds.adapters.torch.accelerator import AcceleratorHost


def require_supported(trainer: Any) -> None:
    """Refuse settings of Trainer that ReGATE would silently not honour: ValueError names one."""
    args = trainer.args
    sampling = _sampling_of(args)
    kind = type(trainer.train_dataset).__name__
    refuse(
        {
            f"{args.n_gpu} GPUs in one process (DataParallel); start one process a GPU, as "
            "torchrun does": args.n_gpu > 1,
            "FSDP1, which hides the model's parameters; set version to 2 in fsdp_config": (
                trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
            ),
            "a model that from_pretrained(distributed_config=...) has sharded; leave that to "
            # transformers 5.6 cannot do that, and has no name for it.
            "Trainer's fsdp": getattr(trainer, "is_distributed_loading_by_transformers", False),
            "average_tokens_across_devices=False, as the loss is the mean over the targets of all "
            "ranks; set it True": args.world_size > 1 and not args.average_tokens_across_devices,
            f"train_dataset={kind}, which does not name its samples; use a map-style data set"
            f"{trainer.keyed_by_user}": _is_stream(trainer.train_dataset),
            f"label_smoothing_factor={args.label_smoothing_factor}, as the teacher's losses and "
            "ours are without it; set it to 0": args.label_smoothing_factor != 0,
            f"train_sampling_strategy={sampling}, which looks into items by name or length; use "
            "random or sequential": sampling not in ("random", "sequential"),
            f"compute_loss_func={trainer.compute_loss_func}, as elision computes the loss of kept "
            "targets itself; leave it out": trainer.compute_loss_func is not None,
            f"a compute_loss of your own ({type(trainer).__name__}), which elision would not call; "
            "remove it": trainer.has_own_compute_loss(),
            "torch_compile=True; set it False and compile each decoder layer": args.torch_compile,
            "use_liger_kernel=True, which replaces the forward that elision wraps; set it False": (
                args.use_liger_kernel
            ),
            "auto_find_batch_size=True, as a step is planned with the size of its batches; set it "
            "False": args.auto_find_batch_size,
            "accelerator_config.dispatch_batches=True, as plans are made on the rank that reads "
            "the data; set it False": bool(args.accelerator_config.dispatch_batches),
        }
    )
    if not trainer.is_deepspeed_enabled:
        AcceleratorHost(trainer.accelerator, trainer.model).require()


def _sampling_of(args: Any) -> str:
    # transformers 5.0 has a flag in its place.
    by_length = "group_by_length" if getattr(args, "group_by_length", False) else "random"
    return getattr(args, "train_sampling_strategy", by_length)


def refuse(reasons: dict[str, bool], trainer: str = "Trainer") -> None:
    """Raise a ValueError with the first reason that is so."""
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"elision in {trainer} is not supported with {reason}")


def _is_stream(dataset: Any) -> bool:
    # Those of Hugging Face's datasets have no length, and are not torch's.
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
