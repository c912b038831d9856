"""Run the blocks of the loops' pages, as they stand, with a small model in the place of yours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from regate_ds import Keyed, Loop, attach
from tests.adapters.torch.loops_helper import whole
from tests.adapters.torch.runs_helper import Items, collate, reference
from tests.house.test_docs import blocks
from tests.support.models import causal_lm
from tests.support.paths import ROOT
from tests.support.planning import config_of

DOCS = ROOT / "docs"
LOOP_PAGES = ("torch_loop.md", "fsdp2_loop.md", "accelerate_loop.md")
EPOCHS = 2


def diff_of(page: str) -> list[str]:
    """The lines of the page's change of a user's loop."""
    (block,) = (block for block, _ in blocks(DOCS / page) if "\n+" in block)
    return block.splitlines()


def version(page: str, gone: str) -> str:
    """The loop before (``gone`` is "+") or after the change ("-")."""
    return "\n".join(line[1:] for line in diff_of(page) if not line.startswith(gone))


def new_lines(page: str) -> list[str]:
    """What the user writes; lines that are only indented otherwise were there before."""
    old = [line[1:].strip() for line in diff_of(page) if not line.startswith("+")]
    added = [line[1:].strip() for line in diff_of(page) if line.startswith("+")]
    return [line for line in added if line not in old]


def other_block(page: str, part: str) -> str:
    (block,) = (block for block, _ in blocks(DOCS / page) if part in block and "\n+" not in block)
    return block


IMPORTED = {
    "DataLoader": DataLoader,
    "DistributedDataParallel": DistributedDataParallel,
    "Keyed": Keyed,
    "Loop": Loop,
    "attach": attach,
    "collate": collate,
    "dcp": dcp,
    "dist": dist,
    "fully_shard": fully_shard,
    "get_state_dict": get_state_dict,
    "torch": torch,
}


def names_of_a_script(*, enabled: bool) -> dict[str, Any]:
    """What a user's script has before the loop."""
    data = Items()
    config = config_of(enabled=enabled, warmup=1, final_dense_share=0.0)
    return {
        **IMPORTED,
        "model": causal_lm(),
        "data": data,
        "config": config,
        "reference": reference(),
        "T": 100,
        "EPOCHS": EPOCHS,
        "Accelerator": partial(Accelerator, cpu=True),
        "sampler": DistributedSampler(data, shuffle=False) if dist.is_initialized() else None,
    }


def run_code(code: str, *, enabled: bool) -> dict[str, Any]:
    """The names that the code leaves behind, and the weights that it has trained."""
    names = names_of_a_script(enabled=enabled)
    model = names["model"]
    exec(code, names)
    return {**names, "weights": {name: whole(p) for name, p in model.named_parameters()}}


def assert_same_weights(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    mine: dict[str, Tensor] = found["weights"]
    assert all(torch.equal(mine[name], weight) for name, weight in wanted["weights"].items())


def check_page(page: str) -> dict[str, Any]:
    """Off is the loop before the change, bit for bit, and on is another run. Returns what that
    leaves behind."""
    before = run_code(version(page, "+"), enabled=True)
    assert_same_weights(run_code(version(page, "-"), enabled=False), before)
    after = run_code(version(page, "-"), enabled=True)
    assert not torch.equal(after["weights"]["lm_head.weight"], before["weights"]["lm_head.weight"])
    counts = after["regate"].metrics()
    assert not counts["dense"]
    assert counts["step"] == EPOCHS * (len(after["loader"]) // 4) - 1
    return after


def check_fsdp2_page(rank: int, folder: Path) -> None:
    after = check_page("fsdp2_loop.md")
    exec(other_block("fsdp2_loop.md", "dcp.save("), {**after, "folder": folder / "page"})
    assert (folder / "page" / ".metadata").is_file()


def check_accelerate_page(rank: int, folder: Path) -> None:
    after = check_page("accelerate_loop.md")
    block = other_block("accelerate_loop.md", "register_for_checkpointing")
    exec(block, {**after, "folder": str(folder / "accelerate-page")})
    dist.barrier()
    assert (folder / "accelerate-page" / "custom_checkpoint_0.pkl").is_file()


def check_ddp_page(rank: int, folder: Path) -> None:
    """The page has the loop after the change alone; before it is FSDP2's."""
    code = other_block("torch_loop.md", "DistributedDataParallel")
    assert not run_code(code, enabled=True)["regate"].metrics()["dense"]
    before = version("fsdp2_loop.md", "+").replace("fully_shard(layer)", "pass")
    before = before.replace("fully_shard(model)", "ddp = DistributedDataParallel(model)")
    before = before.replace("model(**batch)", "ddp(**batch)")
    assert_same_weights(run_code(code, enabled=False), run_code(before, enabled=True))


PAGES = {
    "docs/torch_loop.md, DDP": check_ddp_page,
    "docs/fsdp2_loop.md": check_fsdp2_page,
    "docs/accelerate_loop.md": check_accelerate_page,
}
