import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from regate_ds.job.process import Process
from regate_ds.recipe.engines.deepspeed import ZeroEngine
from regate_ds.recipe.saving import checkpoint, contents
from regate_ds.recipe.saving.checkpoint import (
    choose_checkpoint,
    latest,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from regate_ds.recipe.saving.contents import COMPLETE, Contents, Done
from tests.support.power import Disk, PowerFailure, copy_of

ALONE = Process(0, 1, torch.device("cpu"))


def write(folder, *steps, complete=True):
    for step in steps:
        (folder / f"step-{step:06d}").mkdir()
        if complete:
            (folder / f"step-{step:06d}" / COMPLETE).touch()


def point_to(folder, step):
    (folder / "latest").write_text(f"step-{step:06d}\n")


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_the_pointer_may_end_in_a_new_line(tmp_path):
    write(tmp_path, 5)
    point_to(tmp_path, 5)
    assert latest(tmp_path) == "step-000005"


def test_a_pointer_to_a_missing_folder_says_what_is_there(tmp_path):
    write(tmp_path, 5)
    point_to(tmp_path, 6)
    with pytest.raises(ValueError, match=r"names 'step-000006', .* \(there are: step-000005\)"):
        latest(tmp_path)


def test_old_checkpoints_go_by_the_number_of_their_step(tmp_path):
    write(tmp_path, 999_998, 999_999, 1_000_000)
    point_to(tmp_path, 1_000_000)
    prune_checkpoints(tmp_path, 2)
    assert steps(tmp_path) == [999_999, 1_000_000]


def test_one_that_is_cut_short_does_not_count(tmp_path):
    write(tmp_path, 2, 4, 8)
    write(tmp_path, 6, complete=False)
    point_to(tmp_path, 8)
    prune_checkpoints(tmp_path, 2)
    assert steps(tmp_path) == [4, 6, 8]


def test_one_whose_deletion_was_cut_short_does_not_count(tmp_path, monkeypatch):
    write(tmp_path, 2, 4)
    point_to(tmp_path, 4)
    monkeypatch.setattr("shutil.rmtree", lambda _: None)
    prune_checkpoints(tmp_path, 1)
    assert [path.parent.name for path in tmp_path.glob(f"*/{COMPLETE}")] == ["step-000004"]


def test_those_beyond_the_newest_do_not_displace_it(tmp_path):
    write(tmp_path, 2, 4, 6, 8, 9)
    point_to(tmp_path, 6)
    prune_checkpoints(tmp_path, 1)
    assert steps(tmp_path) == [6, 8, 9]


REGATE: Any = SimpleNamespace(save=lambda _: None, load=lambda *_: None)


def test_without_a_checkpoint_the_way_out_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint; to start anew, delete"):
        newest_checkpoint(tmp_path)


@pytest.fixture
def alone(monkeypatch):
    """A job of one process without a group."""
    monkeypatch.setattr(dist, "barrier", lambda: None)
    engine: Any = SimpleNamespace(
        zero_optimization_stage=lambda: 0,
        save_checkpoint=lambda folder, tag, **_: (Path(folder) / tag).mkdir(parents=True),
        load_checkpoint=lambda folder, tag: (folder, {}),
    )
    return ZeroEngine(engine, REGATE, ALONE)


DONE = Done(step=5, fingerprint="ab", samples_per_step=8, num_ranks=1, figures="0a")


def resume(folder, engine, process=ALONE):
    saved = newest_checkpoint(folder)
    load_checkpoint(saved, engine, process, "")
    return saved.done


def test_a_checkpoint_without_the_engines_files_is_named(tmp_path, alone):
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    alone.engine.load_checkpoint = lambda *_, **__: (None, None)
    with pytest.raises(ValueError, match="step-000005 cannot be read .* lacks the files of DeepS"):
        resume(tmp_path, alone)


def test_nothing_is_left_of_a_step_that_was_saved_before(tmp_path, alone):
    write(tmp_path, 5)
    (tmp_path / "step-000005" / "random-7.pt").touch()
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    assert {p.name for p in (tmp_path / "step-000005").iterdir()} == {"complete", "random-0.pt"}
    assert latest(tmp_path) == "step-000005"


def test_a_rank_that_the_saved_run_did_not_have_keeps_its_random_state(
    tmp_path, alone, monkeypatch
):
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:  # two ranks would share the reading
        patch.setattr(Contents, "require_whole", lambda *_: None)
        resume(tmp_path, alone, Process(1, 2, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)
    assert resume(tmp_path, alone) == DONE
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut", b"no pickle", None])
def test_a_changed_or_missing_file_is_named(tmp_path, alone, content):
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    path = tmp_path / "step-000005" / "random-0.pt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"random-0.pt is missing or not what was saved; name an "):
        resume(tmp_path, alone)


def test_no_changed_bit_goes_unseen(tmp_path, alone):
    """In any byte of any file of a checkpoint, its own record too."""
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    for path in sorted((tmp_path / "step-000005").iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 200)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=path.name):
                resume(tmp_path, alone)
        path.write_bytes(content)
    assert resume(tmp_path, alone) == DONE


def test_a_record_of_another_version_is_named(tmp_path):
    write(tmp_path, 5)
    point_to(tmp_path, 5)
    with pytest.raises(ValueError, match="complete cannot be read .* name an earlier checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_that_was_not_completed_is_named(tmp_path):
    write(tmp_path, 5, complete=False)
    point_to(tmp_path, 5)
    with pytest.raises(ValueError, match="step-000005 is not complete: it has no file complete; "):
        newest_checkpoint(tmp_path)


def test_the_record_names_every_other_file(tmp_path, alone):
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    folder = tmp_path / "step-000005"
    content = json.loads((folder / COMPLETE).read_text().splitlines()[0])
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(content["checksums"]) == names - {COMPLETE}


def test_a_file_that_another_rank_does_not_see_ends_the_save(tmp_path, alone, monkeypatch):
    """As where each node has a run.out of its own: the second of two ranks sees nothing."""
    checksums = contents._checksums
    monkeypatch.setattr(contents, "_checksums", lambda *given: [*checksums(*given)[:-1], 0])
    with pytest.raises(ValueError, match="random-0.pt is seen by the first rank, but not by all"):
        save_checkpoint(tmp_path, DONE, alone, ALONE)
    assert latest(tmp_path) is None


def test_the_first_rank_chooses_what_the_run_goes_on_from(tmp_path, alone, monkeypatch):
    """Also where another one does not see its pointer yet, or an older one."""
    assert choose_checkpoint(tmp_path, ALONE, resumes=False) is None
    save_checkpoint(tmp_path, DONE, alone, ALONE)
    first, second = Process(0, 2, ALONE.device), Process(1, 2, ALONE.device)
    sent: list[str] = []
    monkeypatch.setattr(checkpoint, "broadcast_text", lambda text, *_: sent.append(text) or text)
    choose_checkpoint(tmp_path, first, resumes=True)
    choose_checkpoint(tmp_path, first, resumes=False)
    (tmp_path / "latest").unlink()
    for text, done in zip(sent, (DONE, None), strict=True):
        monkeypatch.setattr(checkpoint, "broadcast_text", lambda *_, text=text: text)
        for resumes in (True, False):
            found = choose_checkpoint(tmp_path, second, resumes=resumes)
            assert (found and found.done) == done


def test_a_conversion_without_room_names_the_way_out(tmp_path, alone, monkeypatch):
    save_checkpoint(tmp_path, replace(DONE, num_ranks=2), alone, ALONE)
    full = SimpleNamespace(
        returncode=1, stderr="...\nOSError: [Errno 28] No space left on device\n"
    )
    monkeypatch.setattr("subprocess.run", lambda *_, **__: full)
    engine = ZeroEngine(alone.engine, REGATE, ALONE, reads_universal=True)
    with pytest.raises(
        ValueError, match=r"step-000005 cannot be converted for 1 ranks \(OSError: "
    ):
        resume(tmp_path, engine)


def test_a_full_disk_is_named_and_the_older_checkpoint_stays_the_newest(tmp_path, alone):
    save_checkpoint(tmp_path, DONE, alone, ALONE)

    def fill(*_, **__):
        raise RuntimeError("[enforce fail] unexpected pos 8896 vs 8788")

    alone.engine.save_checkpoint = fill
    with pytest.raises(RuntimeError, match=r"step-000006 cannot be written .* MB are free"):
        save_checkpoint(tmp_path, replace(DONE, step=6), alone, ALONE)
    assert latest(tmp_path) == "step-000005"


def test_a_run_goes_on_with_its_own_data_only():
    DONE.require("ab", 8)
    with pytest.raises(ValueError, match="with fingerprint ab, but this job's data has cd"):
        DONE.require("cd", 8)


def test_a_run_goes_on_with_as_many_samples_a_step_only():
    with pytest.raises(ValueError, match=r"of 8 samples a step, but .* is 12 here; set run.accum"):
        DONE.require("ab", 12)


def test_the_newest_checkpoint_is_whole_after_a_power_failure_at_any_step(
    tmp_path, alone, monkeypatch
):
    def save(folder, tag, **_):
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "engine.pt").write_bytes(tag.encode() * 100)

    alone.engine.save_checkpoint = save
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run", DONE, alone, ALONE)
    found, step = set(), 0
    while "step-000006" not in found or step < 8:
        root = copy_of(tmp_path / "run", tmp_path / f"{step}")
        with monkeypatch.context() as patch, suppress(PowerFailure):
            disk = Disk(root, patch, fail_at=step)
            save_checkpoint(root, replace(DONE, step=6), alone, ALONE)
        for keeps_names in (False, True):
            place = tmp_path / f"{step} {keeps_names}"
            left = disk.after_power_failure(place, keeps_names=keeps_names)
            tag = latest(left)
            assert tag is not None
            assert (left / tag / "engine.pt").read_bytes() == tag.encode() * 100
            assert (left / tag / COMPLETE).is_file()
            torch.load(left / tag / "random-0.pt")
            found.add(tag)
        step += 1
    assert found == {"step-000005", "step-000006"}
