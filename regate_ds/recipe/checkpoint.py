"""Save and load the checkpoints of a run, and write the finished model.

checkpoints/step-000120/          the engine's files, the method's state in regate/, and
                                  random-<rank>.pt; the file `complete` is written last
checkpoints/latest                the name of the newest complete checkpoint
model/                            the final student, as a Hugging Face folder
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from regate_ds.job.process import Process
from regate_ds.recipe.engines.base import Engine
from regate_ds.recipe.students.student import Student
from regate_ds.stores.atomic_file import sync_files, write_atomically

COMPLETE = "complete"


@dataclass(frozen=True)
class Done:
    """How many steps a checkpoint holds, and on which data they were done."""

    step: int
    """Number of optimizer steps that are done."""

    fingerprint: str
    """Fingerprint of the training set's index."""

    def require(self, fingerprint: str) -> None:
        """Refuse, by ValueError, to resume with other data: samples would come in another order."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the checkpoint was written for data with fingerprint {self.fingerprint}, but "
                f"this job's data has {fingerprint}; resume with the same data, images and chat "
                "template"
            )


def save_checkpoint(folder: Path, done: Done, engine: Engine, process: Process) -> None:
    """Write everything that a resumed run needs, then name it in ``latest``. Collective."""
    tag = f"step-{done.step:06d}"
    if process.is_first and (folder / tag).exists():
        # It is left from before a resume at an earlier step: its files would mix with the new ones.
        _delete(folder / tag)
    dist.barrier()
    with _writing(folder / tag):
        engine.save(folder / tag, asdict(done))
        torch.save(_random_state(process), folder / tag / f"random-{process.rank}.pt")
    dist.barrier()
    with _writing(folder / tag):
        # Every rank calls it, because a node can sync only what was written on that node.
        sync_files(folder / tag)
    dist.barrier()
    if process.is_first:
        write_atomically(folder / tag / COMPLETE, b"")
        write_atomically(folder / "latest", tag.encode())


def load_checkpoint(folder: Path, engine: Engine, process: Process) -> Done:
    """Load the newest checkpoint and return what it has done. Collective.

    ValueError if there is none, or if this number of ranks cannot read it. A rank that the saved
    run did not have keeps the random state that it has at the call.
    """
    tag = latest(folder)
    if tag is None:
        raise ValueError(
            f"{folder} holds no complete checkpoint; to start anew, delete {folder.parent} or "
            "choose another run.out, and leave run.resume out"
        )
    engine.require_ranks(folder / tag, len(list((folder / tag).glob("random-*.pt"))))
    with _reading(folder / tag):
        state = engine.load(folder / tag)
        done = Done(state["step"], state["fingerprint"])
        random_file = folder / tag / f"random-{process.rank}.pt"
        random_state = torch.load(random_file, weights_only=True) if random_file.is_file() else None
    engine.load_method(folder / tag)
    if random_state is not None:
        _set_random_state(random_state, process)
    return done


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Turn a read error into a ValueError that names the checkpoint: torch's names no file."""
    try:
        yield
    except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        # The further lines are torch's advice on settings, which would not help here.
        fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{checkpoint} cannot be read ({fault}); name an earlier checkpoint in "
            f"{checkpoint.parent / 'latest'}"
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a write error into a RuntimeError that names the folder and the space that is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder.parent).free
        raise RuntimeError(
            f"{folder} cannot be written ({type(error).__name__}: {error}; {free / 1e6:.1f} MB are "
            "free there); make room for it or allow writing there, then resume"
        ) from error


def latest(folder: Path) -> str | None:
    """Return the tag of the newest complete checkpoint, or None if there is none.

    ValueError if ``latest`` names a missing folder.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    tag = pointer.read_text().strip()
    if not tag or not (folder / tag).is_dir():
        names = ", ".join(path.name for path in _by_step(folder)) or "none"
        raise ValueError(
            f"{pointer} names {tag!r}, which is no folder beside it; write the name of a "
            f"checkpoint into it (there are: {names})"
        )
    return tag


def prune_checkpoints(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` complete checkpoints; only one process calls it.

    A checkpoint beyond ``latest`` is left from before a resume at an earlier step: it is no newer
    than this run's, so it does not count, and stays until its step is saved again.
    """
    tag = latest(folder)
    if keep is None or tag is None:
        return
    own = [p for p in _by_step(folder) if _step(p) <= _step(folder / tag)]
    complete = [p for p in own if (p / COMPLETE).is_file() and p.name != tag]
    for old in complete[: max(0, len(complete) - keep + 1)]:
        _delete(old)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark first: one that is half deleted must not count as complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _by_step(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save_model(folder: Path, student: Student, model: nn.Module, process: Process) -> None:
    """Write the trained student as a Hugging Face folder, with adapters merged. Collective."""
    weights = full_weights(model, process)
    if process.is_first:
        if hasattr(model, "peft_config"):
            weights = merge_lora(weights, model.peft_config["default"])
        with _writing(folder):
            student.model.save_pretrained(folder, state_dict=weights)
            student.tokenizer.save_pretrained(folder)
            student.vision.processor.save_pretrained(folder)
            sync_files(folder)
    dist.barrier()


def full_weights(model: nn.Module, process: Process) -> dict[str, Tensor]:
    """Return every weight in the first rank's CPU memory, and nothing elsewhere. Collective.

    Under ZeRO-3 the weights are gathered one by one.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with _gathered(parameter):
            if process.is_first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def merge_lora(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return weights under the bare model's names, with W + alpha / rank * B A for each adapter."""
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".base_layer.weight" in name:
            stem = name.removesuffix("base_layer.weight")
            up, down = (
                weights[f"{stem}lora_B.default.weight"],
                weights[f"{stem}lora_A.default.weight"],
            )
            weight = weight + (config.lora_alpha / config.r) * (up @ down)
        merged[bare] = weight
    return merged


def _random_state(process: Process) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(process.device)
    return states


def _set_random_state(states: dict[str, Tensor], process: Process) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], process.device)
