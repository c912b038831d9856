"""The table of bad inputs: of which kind, what is changed, and which command reads it.

The lines that they end with are in bad_inputs.txt, in this order; ``HERE`` is the folder of a case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Edit = Callable[[Path], None]


def nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    kind: str
    arguments: list[str]
    edit: Edit = nothing
    environment: dict[str, str] = field(default_factory=dict[str, str])


PLAN = ["train", "run.yaml", "run.plan_only=true", "run.out=HERE/new"]
TRAIN = ["train", "run.yaml", "run.out=HERE/new"]
ORDERS = ["rank.store=HERE/orders", "elision.images.ranking=diversity"]
RESUME = ["train", "HERE/half/config.yaml", "run.resume=true"]
CHECK = ["data", "check", "run.yaml"]


def put(name: str, content: str | bytes) -> Edit:
    """Write a file."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def swap(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text, (name, old)
        path.write_text(text.replace(old, new, 1))

    return edit


def drop(name: str) -> Edit:
    """Delete the first file of a pattern."""

    def edit(folder: Path) -> None:
        sorted(folder.glob(name))[0].unlink()

    return edit


def cut(name: str, to: int = 40) -> Edit:
    """Leave the first bytes of the first file of a pattern."""

    def edit(folder: Path) -> None:
        path = sorted(folder.glob(name))[0]
        path.write_bytes(path.read_bytes()[:to])

    return edit


def record(**changes: Any) -> Edit:
    """Change fields of record 3; None deletes one."""

    def edit(folder: Path) -> None:
        path = folder / "data" / "train.json"
        records = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del records[3][key]
            else:
                records[3][key] = value
        path.write_text(json.dumps(records))

    return edit


def turns(*turns: Any) -> Edit:
    return record(conversations=list(turns))


def user(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


def plan(kind: str, *settings: str, edit: Edit = nothing) -> Case:
    return Case(kind, [*PLAN, *settings], edit=edit)


CONFIG = [
    plan("config", setting)
    for setting in (
        "elision.keep_share=0",
        "elision.keep_share=.inf",
        "elision.score=fussed",
        "elision.schedule.warmup=-1",
        "elision.images.keep_share=two",
        "elision.first_layer=5",
        "elision.quota=[per_window]",
        "elison.keep_share=0.5",
        "optimizer.lr=-1",
        "optimizer.betas=[0.9]",
        "optimizer.schedule=linear",
        "run.steps=0",
        "run.micro_batch=2.5",
        "run.precision=fp16",
        "run.keep_checkpoints=0",
        "run.resume=maybe",
        "run.deepspeed={zero_optimization: {stage: 4}}",
        "run.deepspeed={train_batch_size: 3}",
        "run.deepspeed=HERE/none.json",
        "data.max_length=1",
        "data.num_workers=-1",
        "teacher.tensor=0",
        "teacher.mode=offline",
        "model.lora=8",
        "run.micro_batch=400",
    )
] + [
    Case("config", PLAN, edit=put("run.yaml", "model: [\n")),
    Case("config", PLAN, edit=put("run.yaml", "- 1\n- 2\n")),
    Case("config", PLAN, edit=put("run.yaml", b"\xff\xfe\x00")),
    Case("config", PLAN, edit=swap("run.yaml", "teacher:", "model: {path: x}\nteacher:")),
    Case("config", ["train", "none.yaml"]),
]

DATA = [
    Case("data", PLAN, edit=edit)
    for edit in (
        drop("data/train.json"),
        put("data/train.json", ""),
        put("data/train.json", "{}"),
        put("data/train.json", "[]"),
        cut("data/train.json", 3000),
        record(conversations=None),
        put("data/train.json", "[1, 2]"),
        turns(user("<image>\nHow many?")),
        turns(answer("Three.")),
        turns(user("<image>\nHow many?"), answer("")),
        turns(user("How many?"), answer("Three.")),
        turns(user("<image><image>\nHow many?"), answer("Three.")),
        turns(user("<image>\nHow many?"), answer(3)),
        turns(user("<image>\nHow many?"), answer("Three.", weight=0.5)),
        turns({"from": "robot", "value": "<image>"}, answer("Three.")),
        turns(user("<image>\nSee <img>a.png</img>"), answer("Three.")),
        turns(user("<image>\nHow many?"), answer("Three.", gold_spans=[[0, 999]])),
        turns(user("<image>\nHow many?"), answer("Three.", gold_spans="all")),
        turns(user("<image>\nHow many?"), answer("Three.", loss="maybe")),
        turns(user("<image>\nHow many?"), {"from": "gpt"}),
        turns(7, answer("Three.")),
        record(images=["images/train_000004.png"]),
        record(video="none.mp4"),
        record(audio="a.wav"),
        record(tools="["),
    )
] + [
    Case("data", [*PLAN, "data.train=HERE/data/none.parquet"]),
    Case("data", [*PLAN, "data.train=HERE/data/images"]),
    Case("data", [*CHECK, "data.test=HERE/data/none.json"]),
]

IMAGES = [
    Case("images", PLAN, edit=edit)
    for edit in (
        record(image="none.png"),
        record(image="images"),
        record(image=""),
        record(image=7),
        record(image="http://example.org/a.png"),
        record(image="data:image/png;base64,AAAA"),
        record(image="x" * 300 + ".png"),
        put("data/images/train_000003.png", "no picture"),
        cut("data/images/train_000003.png", 60),
    )
] + [
    Case("images", [*PLAN, "data.inside_root=true"], edit=record(image="../run.yaml")),
    Case("images", [*PLAN, "data.image_root=HERE/none"]),
]

STORES = [
    Case("stores", [*TRAIN, *ORDERS], edit=edit)
    for edit in (
        drop("store/manifest.json"),
        cut("store/manifest.json"),
        swap("store/manifest.json", '"format"', '"formal"'),
        drop("store/shard-*.fp16"),
        cut("store/shard-*.fp16"),
        drop("store/rows-*.npy"),
        drop("orders/manifest.json"),
        cut("orders/manifest.json"),
        drop("orders/shard-*.u16"),
        cut("orders/shard-*.u16"),
    )
] + [
    Case("stores", [*TRAIN, "teacher.store=HERE/none"]),
    Case("stores", [*TRAIN, "teacher.store=HERE/orders"]),
    Case("stores", [*TRAIN, *ORDERS[1:]]),
    Case("stores", [*TRAIN, ORDERS[0], "elision.images.ranking=attention"]),
    Case("stores", [*TRAIN, "teacher.column=gain"]),
    Case("stores", ["teacher", "run.yaml", "teacher.store=null"]),
    Case("stores", ["rank", "run.yaml", ORDERS[1]]),
    Case("stores", ["rank", "run.yaml", ORDERS[0]]),
    Case("stores", ["store", "info", "HERE/none"]),
]

STEP = "half/checkpoints/step-000012"

CHECKPOINTS = [
    Case("checkpoints", RESUME, edit=edit)
    for edit in (
        drop("half/checkpoints/latest"),
        put("half/checkpoints/latest", "step-000099"),
        drop(f"{STEP}/complete"),
        cut(f"{STEP}/complete"),
        drop(f"{STEP}/random-0.pt"),
        cut(f"{STEP}/mp_rank_00_model_states.pt"),
        drop(f"{STEP}/regate/*"),
        put("half/config.yaml", "model: 7"),
        put("half/metrics.jsonl", "7\n"),
    )
] + [
    Case("checkpoints", [*RESUME, "elision.keep_share=0.25"]),
    Case("checkpoints", [*RESUME, "run.accumulation=3"]),
    Case("checkpoints", [*RESUME, "run.steps=40"]),
    Case("checkpoints", ["train", "run.yaml", "run.out=HERE/half"]),
    Case("checkpoints", [*TRAIN, "run.resume=true"]),
]

COMMAND_LINE = [
    Case("command line", arguments)
    for arguments in (
        [],
        ["trian", "run.yaml"],
        ["train"],
        ["train", "run.yaml", "--fast"],
        ["train", "run.yaml", "keep_share"],
        ["train", "run.yaml", "elision.keep_share=[1"],
        ["eval", "HERE/none"],
        ["eval", "HERE/half", "--batch", "0"],
        ["compare", "HERE/store"],
        ["data", "digits"],
        ["data", "digits", "HERE/digits", "--train", "0"],
        ["bench", "learning", "finall"],
        ["bench", "sleep"],
        ["doctor", "--model", "HERE/none"],
    )
]

ENVIRONMENT = [
    Case("environment", PLAN if name == "plan" else TRAIN, environment=environment)
    for name, environment in (
        ("train", {"RANK": "a", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
        ("train", {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
        ("train", {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}),
        ("train", {"RANK": "0"}),
        ("train", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}),
        ("train", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "x"}),
        ("train", {"PMI_RANK": "0", "PMI_SIZE": "2"}),
        ("train", {"DEEPSPEED_TIMEOUT": "soon"}),
    )
]

CASES: list[Case] = [
    *CONFIG, *DATA, *IMAGES, *STORES, *CHECKPOINTS, *COMMAND_LINE, *ENVIRONMENT,
]  # fmt: skip
