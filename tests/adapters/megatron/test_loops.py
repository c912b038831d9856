"""Loops that are not ours: what is rebound, when a step ends, and what of a batch is read."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.adapters.megatron.loops import megatron_bridge as bridge
from regate_ds.adapters.megatron.loops import megatron_lm
from regate_ds.adapters.megatron.loops.deferred import DeferredAttach, HostFacts, LoopSettings
from regate_ds.adapters.megatron.samples import (
    ImageTokens,
    RepeatedTokens,
    TeacherItems,
    read_tokens,
    teacher_batch,
)
from regate_ds.algorithm.batch import IGNORE
from regate_ds.config import RegateConfig
from regate_ds.data.keyed import KEY, Keyed, KeyedCollate
from tests.adapters.megatron import loop_helper as host_checks
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.adapters.megatron.pretrain_script_helper import LENGTH, Samples

SETTINGS = LoopSettings(elision=RegateConfig(keep_share=1.0))
IMAGE = ImageTokens(placeholder=-200, num_positions=3)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop with the names and signatures of megatron/training/training.py."""
    loop = ModuleType("megatron.training.training")
    saved: list[int] = []

    def train_step(forward_step_func, data_iterator, model, optimizer, forward_backward_func):
        forward_backward_func(model=model)
        return {}, optimizer == "overflow", False, optimizer == "exit", None

    loop.train_step = train_step  # type: ignore[attr-defined]
    loop.get_forward_backward_func = lambda: None  # type: ignore[attr-defined]
    loop.save_checkpoint = lambda iteration, model: saved.append(iteration)  # type: ignore
    loop.build_pretraining_data_loader = lambda dataset, consumed_samples: dataset  # type: ignore
    package = ModuleType("megatron.training")
    package.training = loop  # type: ignore[attr-defined]
    args = SimpleNamespace(save="ckpt", load="ckpt", iteration=2, train_iters=9)
    package.get_args = lambda: args  # type: ignore[attr-defined]
    checkpointing = ModuleType("megatron.training.checkpointing")
    checkpointing.get_checkpoint_name = (  # type: ignore[attr-defined]
        lambda path, iteration, return_base_dir: f"{path}/iter_{iteration:07d}"
    )
    for module in (package, loop, checkpointing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return loop


def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What our part hears, in order."""
    heard: list[Any] = []
    monkeypatch.setattr(DeferredAttach, "end_step", lambda _, *, applied: heard.append(applied))
    monkeypatch.setattr(DeferredAttach, "abandon_step", lambda _: heard.append("abandoned"))
    monkeypatch.setattr(DeferredAttach, "save", lambda _, folder: heard.append(folder))
    return heard


@dataclass
class Attaching:
    """What a loop that is not ours attaches with, and what the attached run then hears."""

    total_steps: list[int] = field(default_factory=list)
    loaded: list[Path] = field(default_factory=list)

    def attach(self, models: Any, config: RegateConfig, *, total_steps: int, **_: Any) -> Any:
        self.total_steps.append(total_steps)
        return SimpleNamespace(wrap=lambda schedule: schedule, load=self.loaded.append)


@pytest.fixture
def attaching(monkeypatch: pytest.MonkeyPatch) -> Attaching:
    made = Attaching()
    monkeypatch.setattr(f"{DeferredAttach.__module__}.attach", made.attach)
    return made


def test_a_run_under_megatron_lm_is_as_long_as_its_arguments_say(training, attaching):
    training.get_forward_backward_func = lambda: lambda **arguments: None
    with megatron_lm.installed(SETTINGS):
        schedule = training.get_forward_backward_func()
        assert attaching.total_steps == []
        schedule(model="m")
        schedule(model="m")
    assert attaching.total_steps == [9]
    assert attaching.loaded == [Path("ckpt/iter_0000002")]


def test_megatron_lms_steps_end_ours_and_its_checkpoints_hold_our_state(training, monkeypatch):
    heard = told(monkeypatch)
    before = dict(vars(training))
    with megatron_lm.installed(SETTINGS):
        for optimizer in ("applied", "overflow", "exit"):
            training.train_step(None, None, None, optimizer, lambda model: None)
        training.save_checkpoint(7, None)
        loaded = training.build_pretraining_data_loader(Samples(3), 0)[2][KEY]
    assert heard == [True, False, "abandoned", Path("ckpt/iter_0000007")]
    assert loaded == ("train", 2)
    assert vars(training) == before
    assert megatron_lm._loaded_folder() == Path("ckpt/iter_0000002")


def test_a_loop_of_another_kind_is_refused_by_name(training, monkeypatch):
    monkeypatch.setattr(training, "train_step", lambda everything: None)
    refused = pytest.raises(ValueError, match="train_step takes no data_iterator")
    with refused, megatron_lm.installed(SETTINGS):
        pass


@pytest.fixture(scope="module")
def wrapper() -> Any:
    path = ROOT / "launch" / "pretrain_wrapper.py"
    spec = importlib.util.spec_from_file_location("pretrain_wrapper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments",
    [["--regate-config", "c", "s.py", "--lr", "1"], ["s.py", "--lr", "1", "--regate-config=c"]],
)
def test_the_flag_is_taken_out_of_the_scripts_arguments(wrapper, arguments: list[str]):
    assert wrapper.taken_out(arguments) == ("c", ["s.py", "--lr", "1"])


@pytest.mark.parametrize(
    "arguments", [["s.py"], ["--regate-config"], ["--regate-config", "c"], ["--regate-config="]]
)
def test_a_wrapper_without_flag_or_script_says_how_it_is_called(wrapper, arguments: list[str]):
    with pytest.raises(SystemExit, match="usage: "):
        wrapper.taken_out(arguments)


def test_the_wrapper_runs_a_script_as_its_own_main_would_be(
    wrapper, training, monkeypatch, tmp_path: Path
):
    (tmp_path / "c.yaml").write_text("elision: {keep_share: 1.0}\n")
    script = tmp_path / "pretrain_it.py"
    script.write_text(
        "import sys, beside\n"
        "from megatron.training import training\n"
        "beside.seen += [__name__, sys.argv, training.train_step.__wrapped__]\n"
    )
    (tmp_path / "beside.py").write_text("seen = []\n")
    given = ["wrapper", "--regate-config", str(tmp_path / "c.yaml"), str(script), "--lr", "1"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(sys, "path", list(sys.path))
    host = training.train_step
    wrapper.main()
    assert sys.modules.pop("beside").seen == ["__main__", [str(script), "--lr", "1"], host]
    assert training.train_step is host


def test_the_wrapper_runs_with_the_megatron_beside_the_script(tmp_path: Path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise SystemExit('the one beside')")
    (tmp_path / "c.yaml").write_text("elision: {}\n")
    (tmp_path / "pretrain_it.py").touch()
    wrapper = [sys.executable, str(ROOT / "launch" / "pretrain_wrapper.py")]
    command = [*wrapper, "--regate-config", str(tmp_path / "c.yaml"), "pretrain_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.strip() == "the one beside"


@pytest.fixture
def bridged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules with the names of Megatron-Bridge's."""
    bare = ModuleType("megatron.bridge")
    for name in ("training", "training.train", "training.callbacks", "training.pretrain"):
        module = ModuleType(f"megatron.bridge.{name}")
        above, _, last = module.__name__.rpartition(".")
        setattr(sys.modules.get(above, bare), last, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "megatron.bridge", bare)
    loop: Any = bare.training  # type: ignore[attr-defined]
    loop.train.get_forward_backward_func = lambda pp_size, vp_size: lambda **arguments: None
    loop.callbacks.Callback = type("Callback", (), {})

    def provider(num_samples: list[int], config: Any, tokenizer: Any = None) -> Any:
        return [*num_samples], [1], None

    loop.pretrain.get_dataset_provider = lambda config: provider
    return bare


def test_bridges_training_items_say_their_key(bridged):
    pretrain = bridged.training.pretrain
    host = pretrain.get_dataset_provider
    with bridge.installed_in_bridge(SETTINGS):
        provider = pretrain.get_dataset_provider("config")
        assert [*inspect.signature(provider).parameters] == ["num_samples", "config", "tokenizer"]
        train, valid, test = provider([{}, {}], "config")
        assert train[1] == {KEY: ("train", 1)}
        assert (valid, test) == ([1], None)
    assert pretrain.get_dataset_provider is host


def test_a_bridge_data_sets_own_collate_function_does_not_lose_the_keys(bridged):
    class Own(Samples):
        def collate_fn(self, items: list[dict[str, Any]]) -> dict[str, Any]:
            assert all(KEY not in item for item in items)
            batch = torch.utils.data.default_collate(items)
            return {"input_ids": batch["tokens"]} | {k: batch[k] for k in ("labels", "loss_mask")}

    pretrain, data = bridged.training.pretrain, Own(8)
    pretrain.get_dataset_provider = lambda config: lambda sizes, config: (data, None, None)
    with bridge.installed_in_bridge(SETTINGS):
        keyed, _, _ = pretrain.get_dataset_provider("config")([8], "config")
    batch = keyed.collate_fn([keyed[n] for n in (3, 5)])
    tokens = read_tokens(batch)
    assert tokens.keys == ((("train", 3),), (("train", 5),))
    # The teacher reads the same samples by the same function.
    theirs = KeyedCollate(teacher_batch)([Keyed(TeacherItems(data), "train")[3]]).tokens
    real = tokens.segment_BT[0] >= 0
    assert torch.equal(tokens.labels_BT[:1, real], theirs.labels_BT[:, : int(real.sum())])


def test_each_run_of_an_images_tokens_is_an_image():
    batch = collated([1, 2])
    batch["input_ids"] = batch.pop("tokens")
    batch["input_ids"][0, [2, 3, 5, 7]] = torch.tensor([90, 90, 91, 90])
    image_BT = read_tokens(batch, image=RepeatedTokens((90, 91))).image_BT
    assert image_BT[0, :8].tolist() == [-1, -1, 0, 0, -1, 1, -1, 2]
    assert bool((image_BT[1] == -1).all())


def test_bridges_callback_ends_steps(bridged, attaching, monkeypatch):
    train = bridged.training.train
    host = train.get_forward_backward_func
    heard = told(monkeypatch)
    checkpoint = SimpleNamespace(save="ckpt", load="ckpt", async_save=True)
    train_config, model = SimpleNamespace(train_iters=9), SimpleNamespace()
    facts = SimpleNamespace(checkpoint=checkpoint, train=train_config, model=model)
    state = SimpleNamespace(train_state=SimpleNamespace(step=5), cfg=facts)
    with bridge.installed_in_bridge(SETTINGS) as callback:
        assert train.get_forward_backward_func is not host
        with pytest.raises(ValueError, match="async_save=True"):
            callback.on_train_start(SimpleNamespace(state=state))
        checkpoint.async_save = False
        callback.on_train_start(SimpleNamespace(state=state))
        train.get_forward_backward_func(1, None)(model="m")
        callback.on_train_step_end(SimpleNamespace(skipped_iter=True))
        callback.on_checkpoint_save(SimpleNamespace(state=state))
    assert attaching.total_steps == [9]
    assert attaching.loaded == [Path("ckpt/iter_0000005")]
    assert heard == [False, Path("ckpt/iter_0000005")]
    assert train.get_forward_backward_func is host


def test_a_run_without_bridges_callback_is_refused(bridged):
    train = bridged.training.train
    with bridge.installed_in_bridge(SETTINGS), pytest.raises(RuntimeError, match="pass callbacks="):
        train.get_forward_backward_func(1, None)(model="m")


def test_evaluation_is_the_hosts_own():
    calls: list[Any] = []
    deferred = DeferredAttach(SETTINGS, HostFacts(total_steps=lambda: 4))
    deferred.wrap(lambda **arguments: calls.append(arguments))(forward_only=True, model="m")
    assert calls == [{"forward_only": True, "model": "m"}]
    assert deferred.regate is None


def collated(numbers: list[int]) -> dict[str, Any]:
    data = Keyed(Samples(8), "train")
    return torch.utils.data.default_collate([data[n] for n in numbers])


def test_a_batch_is_read_up_to_its_last_target():
    batch = collated([3, 5])
    tokens = read_tokens(batch)
    assert tokens.keys == ((("train", 3),), (("train", 5),))
    counted = batch["loss_mask"] > 0
    assert torch.equal(tokens.is_label_BT, counted)
    assert torch.equal(tokens.labels_BT[counted], batch["labels"][counted])
    for row in range(2):
        last = int(counted[row].nonzero()[-1])
        assert (tokens.segment_BT[row] >= 0).tolist() == [t <= last for t in range(LENGTH)]


def test_what_a_batch_lacks_is_named():
    batch = collated([1])
    with pytest.raises(ValueError, match=KEY):
        read_tokens({k: v for k, v in batch.items() if k != KEY})
    for name in ("cu_seqlens", "cu_lengths", "cu_seqlens_q"):
        with pytest.raises(ValueError, match=f"a batch has {name}, so its rows hold several"):
            read_tokens({**batch, name: torch.tensor([0, 4])})


def test_weights_of_targets_are_refused():
    batch = collated([1])
    with pytest.raises(ValueError, match="loss_mask weighs targets"):
        read_tokens({**batch, "loss_mask": batch["loss_mask"] / 2})


def test_a_mask_that_cuts_more_than_what_comes_later_is_refused():
    batch = collated([1, 5])
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    plain = read_tokens({**batch, "attention_mask": mask})
    # What comes after the last target may be masked in any way.
    last = int((plain.segment_BT[0] >= 0).nonzero()[-1])
    mask[0, 0, last + 1 :] = True
    read_tokens({**batch, "attention_mask": mask})
    mask[0, 0, last:, 0] = True
    with pytest.raises(ValueError, match="not causal order alone"):
        read_tokens({**batch, "attention_mask": mask})


@pytest.mark.parametrize(
    ("max_length", "pads", "expected"),
    [(None, False, [2, -9, -9, -9, -9, 4, 9]), (5, False, [2, -9, -9, -9, -9])]
    + [(9, False, [2, -9, -9, -9, -9, 4, 9]), (9, True, [2, -9, -9, -9, -9, 4, 9, -9, -9])],
)
def test_images_take_the_places_that_llava_gives_them(max_length, pads, expected):
    # Text 1 2, an image of three, text 3 4: neither the image nor the 2 before it has a target.
    ids = torch.tensor([[1, 2, IMAGE.placeholder, 3, 4]])
    labels = torch.tensor([[2, IMAGE.placeholder, 3, 4, 9]])
    batch = {"tokens": ids, "labels": labels, "loss_mask": torch.ones(1, 5)}
    batch[KEY] = [("train",), torch.tensor([0])]
    image = replace(IMAGE, max_length=max_length, pads=pads)
    found = read_tokens(batch, image=image).labels_BT
    # Text at its own places: 1, 2, then three of the image, then 3 and 4.
    assert found.tolist() == [[IGNORE if label == -9 else label for label in expected]]


@pytest.mark.slow
def test_labels_around_images_are_llavas_own(pool: Pool):
    pool.run(1, host_checks.check_image_labels, Case(model="llava"))


@pytest.mark.parametrize("image", [None, IMAGE])
def test_the_teacher_scores_the_targets_that_the_student_is_planned_by(image):
    data = Samples(8)
    keyed, collate = Keyed(TeacherItems(data, image), "train"), KeyedCollate(teacher_batch)
    for number in range(8):
        item = Keyed(data, "train")[number]
        if image is not None:
            item["tokens"] = item["tokens"].index_fill(0, torch.tensor(1), image.placeholder)
            item["labels"] = item["labels"].index_fill(0, torch.tensor(0), image.placeholder)
            keyed = Keyed(TeacherItems([item], image), "train")
        batch = torch.utils.data.default_collate([item])
        mine = read_tokens(batch, image=image)
        theirs = collate([keyed[0 if image is not None else number]]).tokens
        assert image is not None or mine.keys == theirs.keys == ((("train", number),),)
        # The same labels at the same positions, of samples that end with their last target.
        real = mine.segment_BT[0] >= 0
        assert torch.equal(real.nonzero(), (theirs.segment_BT[0] >= 0).nonzero())
        assert torch.equal(mine.labels_BT[:, real], theirs.labels_BT[:, : int(real.sum())])


@pytest.mark.slow
def test_the_example_of_a_loop_runs_as_its_page_says(tmp_path: Path):
    # As docs/megatron_core.md has it; only the shim stands between the command and the script.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        + [
            "--nproc-per-node",
            "2",
            "-m",
            "regate_ds.adapters.megatron_on_cpu",
            "launch/megatron_core_loop.py",
        ]
        + ["--pipeline", "2", "--steps", "4", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {n}" for n in range(4)]
    kept = [line.split(", ")[1].split() for line in lines]
    assert all(int(k[0]) < int(k[2]) for k in kept)
    assert (tmp_path / "regate" / "state.json").is_file()
