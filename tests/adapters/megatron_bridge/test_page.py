"""docs/megatron_bridge.md, followed literally: scoring, pretraining on two stages, fine-tuning.

`make test-bridge` runs this, in an environment of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_docs import blocks
from tests.support.paths import ROOT

if importlib.util.find_spec("megatron") is None or (
    importlib.util.find_spec("megatron.bridge") is None
):
    pytest.skip("make test-bridge installs Megatron-Bridge", allow_module_level=True)

STEP = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+)")


def test_the_page_can_be_followed(tmp_path: Path):
    for name in ("launch", "regate_ds"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = next(text for text, _ in blocks(ROOT / "docs/megatron_bridge.md") if "export" in text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = STEP.findall(done.stdout)
    assert [int(number) for number, _, _ in steps] == [1, 2, 3, 4] * 2
    assert all(0 < float(value) < 10 for _, *values in steps for value in values)
    # Fine-tuning begins with the weights that pretraining ended with, on other stages.
    assert float(steps[4][1]) < float(steps[0][1])
    out = tmp_path / "runs" / "bridge" / "pretrained"
    assert (out / "iter_0000004" / "regate" / "state.json").is_file()
