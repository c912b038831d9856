"""ReGATE in LLaMA-Factory's supervised fine-tuning: its train script with two lines more.

    from llamafactory.train.tuner import run_exp

    with installed_in_llama_factory(RegateConfig(), reference=Scored("store")):
        run_exp()

LLaMA-Factory has no door for a trainer of one's own: inside the block the trainer's name in its
workflow is bound to a class of ours over its own, and put back at the end. Stages and settings that
would train without elision, or wrongly, are refused by name before anything is loaded.

Tested with llamafactory 0.9.5 (transformers 5.6.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from regate_ds.adapters.computed import Reference
from regate_ds.adapters.trainers.hf_trainer import NAME, RegateMixin
from regate_ds.adapters.trainers.limits import refuse
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.config import RegateConfig, require_config
from regate_ds.data.keyed import Keyed
from regate_ds.stores.image_orders.reader import ImageOrderStore

_HOST = "LLaMA-Factory"

TRAINER = "CustomSeq2SeqTrainer"
"""Name of the trainer in LLaMA-Factory's workflow."""

_EXPECTED = {"finetuning_args", "processor", "model_args", "gen_kwargs", "ref_model"}


class RegateFactoryTrainer(RegateMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer of the stage ``sft``, with ``regate``, ``reference``, ``orders``."""

    keyed_by_user = ""
    _host_class = CustomSeq2SeqTrainer

    def _make_ready(self) -> None:
        self.train_dataset = Keyed(self.train_dataset, NAME)


@contextmanager
def installed_in_llama_factory(
    regate: RegateConfig,
    *,
    reference: Reference | Scored | None = None,
    orders: ImageOrderStore | None = None,
) -> Iterator[None]:
    """Make what LLaMA-Factory trains inside the block follow plans.

    The arguments are those of ``RegateMixin``. RuntimeError if the trainer is replaced already, or
    takes other arguments than the one that was tested.
    """
    require_config("regate", regate)
    _require_known()
    made = partial(RegateFactoryTrainer, regate=regate, reference=reference, orders=orders)
    ours: list[tuple[Any, str, Any]] = [(workflow, TRAINER, made)]
    if regate.enabled:
        ours += [
            (tuner, "get_ray_args", _checked(tuner.get_ray_args, _require_no_ray)),
            (tuner, "get_train_args", _checked(tuner.get_train_args, _require_supported)),
        ]
    hosts = [(module, name, getattr(module, name)) for module, name, _ in ours]
    for module, name, replacement in ours:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, host in hosts:
            setattr(module, name, host)


def _require_known() -> None:
    if getattr(workflow, TRAINER) is not CustomSeq2SeqTrainer:
        raise RuntimeError(
            f"llamafactory.train.sft.workflow.{TRAINER} is replaced already; install elision once, "
            "and nothing else that replaces it"
        )
    missing = _EXPECTED - set(signature(CustomSeq2SeqTrainer.__init__).parameters)
    if missing:
        raise RuntimeError(
            f"LLaMA-Factory's {TRAINER} takes no {', '.join(sorted(missing))}; use llamafactory "
            "0.9.5, with which this was tested"
        )


def _checked(read: Callable[..., Any], check: Callable[[Any], None]) -> Callable[..., Any]:
    """Return ``read`` with a look at what it has read."""

    @wraps(read)
    def reading(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        check(found)
        return found

    return reading


def _require_no_ray(ray_args: Any) -> None:
    refuse(
        {"USE_RAY=1, whose workers would train without elision; leave it out": ray_args.use_ray},
        _HOST,
    )


def _require_supported(found: tuple[Any, ...]) -> None:
    """Refuse what LLaMA-Factory can do and elision cannot: ValueError names it."""
    model, data, _, tuning, _ = found
    refuse(
        {
            f"stage={tuning.stage!r}, whose trainer is another; set stage: sft": (
                tuning.stage != "sft"
            ),
            "USE_MCA=1, Megatron-core's trainer, which elides by its own adapter; leave it out": (
                tuning.use_mca
            ),
            "use_hyper_parallel=True, whose trainer is another; set it False": (
                getattr(tuning, "use_hyper_parallel", False)
            ),
            **{
                f"{name}=True, a loss that elision would not compute; set it False": (
                    getattr(tuning, name)
                )
                for name in ("use_dft_loss", "use_eaft_loss", "use_asft_loss")
            },
            "streaming=True, whose samples have no numbers to be named by; set it False": (
                data.streaming
            ),
            "use_badam=True, which trains a part of the layers at a time; set it False": (
                tuning.use_badam
            ),
            "neat_packing=True, whose mask of a row's samples elision would not read; set it "
            "False": data.neat_packing,
            **{
                f"{name}=True, which replaces the forward or the layers that elision wraps; set it "
                "False": getattr(model, name)
                for name in ("enable_liger_kernel", "use_unsloth", "shift_attn", "use_kt")
            },
            f"mixture_of_depths={model.mixture_of_depths!r}, which replaces the layers that "
            "elision wraps; leave it out": model.mixture_of_depths is not None,
        },
        _HOST,
    )
