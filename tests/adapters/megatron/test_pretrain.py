"""Megatron-LM's own `pretrain`, run by the wrapper on CPUs. `make test-matrix` runs it: only the
wheels of megatron-core for Python 3.12 hold `megatron.training`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")
pytest.importorskip("megatron.training", reason="megatron-core 0.19.2 ships it")

from regate_ds.adapters.megatron.samples import read_tokens
from regate_ds.data.keyed import Keyed
from regate_ds.stores.reference.lifecycle import begin_store
from regate_ds.stores.reference.writer import ReferenceWriter
from tests.adapters.megatron.pretrain_script_helper import Samples
from tests.support.stores import RandomReference, index_of

NUM_SAMPLES = 32
ARGUMENTS = shlex.split("""
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 32
--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 0.01
--lr-decay-style constant --tokenizer-type NullTokenizer --vocab-size 60 --transformer-impl local
--distributed-backend gloo --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
--position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--eval-iters 1 --eval-interval 100 --log-interval 1 --calculate-per-token-loss --num-workers 0
--use-cpu-initialization --no-create-attention-mask-in-dataloader --ckpt-format torch
--untie-embeddings-and-output-weights --make-vocab-size-divisible-by 32
""")
STEP = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+)")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --regate-config names; the second of four steps is sparse, and so are the others."""
    folder = tmp_path_factory.mktemp("regate")
    loader = torch.utils.data.DataLoader(Keyed(Samples(NUM_SAMPLES), "train"), batch_size=1)
    index = index_of(read_tokens(item) for item in loader)
    begin_store(folder / "store", index, "made up", lambda _: [torch.arange(NUM_SAMPLES)], 64)
    writer = ReferenceWriter(folder / "store", index)
    writer.write_shard(0, RandomReference(index).read(index.keys))
    writer.finish()
    path = folder / "regate.yaml"
    path.write_text(
        "elision: {schedule: {warmup: 1, final_dense_share: 0}}\n"
        f"reference: {folder / 'store'}\n"
    )
    return path


def pretrain(config: Path | None, *more: str, ranks: int = 1) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    script = str(ROOT / "tests/adapters/megatron/pretrain_script_helper.py")
    wrapper = str(ROOT / "launch/pretrain_wrapper.py")
    command = [script] if config is None else [wrapper, "--regate-config", str(config), script]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            *launch,
            "-m",
            "regate_ds.adapters.megatron_on_cpu",
        ]
        + [*command, *ARGUMENTS, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(n): (float(a), float(b)) for n, a, b in STEP.findall(done.stdout)}


def test_runs_under_tensor_parallelism_log_what_the_hosts_own_does(config: Path, tmp_path: Path):
    dense = tmp_path / "dense.yaml"
    dense.write_text("elision: {execution: none}\n")
    host, found, elided = (
        pretrain(one, "--tensor-model-parallel-size", "2", ranks=2) for one in (None, dense, config)
    )
    assert list(host) == list(found) == list(elided) == [1, 2, 3, 4]
    # The output layer runs on label positions only, so that sums are of other rows: rounding.
    for step, values in host.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step
    # Its first step is dense; those after it have other, and fewer, targets.
    assert elided[1] == pytest.approx(host[1], rel=1e-4)
    assert all(elided[step] != pytest.approx(host[step], rel=1e-4) for step in (2, 3, 4))


def test_a_pipelined_run_resumes_as_if_it_had_never_stopped(config: Path, tmp_path: Path):
    stages = ["--pipeline-model-parallel-size", "2", "--save", str(tmp_path), "--save-interval"]
    whole = pretrain(config, *stages, "2", ranks=2)
    assert (tmp_path / "iter_0000002" / "regate" / "state.json").is_file()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = pretrain(config, *stages, "100", "--load", str(tmp_path), ranks=2)
    # Not the losses: the host's own loop prints other ones after a resume, too.
    assert [resumed[step][1] for step in (3, 4)] == [whole[step][1] for step in (3, 4)]
