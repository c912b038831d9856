"""The program of `make test-gpu`, on the CPU and with torch only: it passes, fails and skips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import algorithm_helper, run
from tests.gpu.check_helper import Check, Measured, run_check


def run_part(part: str, folder: Path) -> tuple[int, dict[str, Any]]:
    path = folder / "report.json"
    arguments = [part, "--only", "algorithm", "--device", "cpu", "--report", str(path)]
    return run.main(arguments), json.loads(path.read_text())


@pytest.mark.parametrize("part", ["oracle", "off"])
def test_each_part_passes_and_reports_what_it_measured(part: str, tmp_path: Path):
    code, report = run_part(part, tmp_path)
    assert (code, report["failed"]) == (0, 0)
    assert (report["device"], report["torch"]) == ("cpu", torch.__version__)
    assert {check["dtype"] for check in report["checks"]} >= {"fp32", "bf16"}
    assert all(check["error"] <= check["bound"] for check in report["checks"])


@pytest.mark.parametrize("part", ["step", "loss"])
def test_the_parts_that_measure_run_without_a_device(part: str, tmp_path: Path):
    path = tmp_path / "report.json"
    assert run.main([part, "--device", "cpu", "--report", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["passed"] == len(report["checks"]) >= 2
    assert all(check["note"] for check in report["checks"] if "time" in check["name"])


def three_percent_off(*args: Any) -> torch.Tensor:
    return 1.03 * right_losses(*args)


def one_less(*args: Any, **kwargs: Any) -> tuple[list[list[int]], int]:
    rows, num_filled = right_kept(*args, **kwargs)
    return [row[:-1] for row in rows], num_filled


right_losses, right_kept = algorithm_helper.plain_losses, algorithm_helper.plain_kept
WRONG = {
    "plain_losses": (three_percent_off, "summed loss, no bias, and gradients", 8),
    "plain_kept": (one_less, "padded plans", 1),
    "restore": (lambda x, y, plan: x, "keep and restore, and gradients", 2),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_fails_the_check_by_name(what: str, tmp_path: Path, monkeypatch, capsys):
    wrong, name, num_failed = WRONG[what]
    monkeypatch.setattr(algorithm_helper, what, wrong)
    code, report = run_part("oracle", tmp_path)
    assert (code, report["failed"]) == (1, num_failed)
    assert name in {c["name"].split(": ")[1] for c in report["checks"] if not c["passed"]}
    assert f"FAILED algorithm: {name}" in capsys.readouterr().out


def test_a_check_that_breaks_has_failed_and_so_has_one_without_a_number():
    def breaks() -> Measured:
        raise KeyError("what")

    assert not run_check(Check("breaks", "fp32", breaks)).passed
    assert not run_check(Check("no number", "fp32", lambda: Measured(float("nan"), 1.0))).passed


def test_what_needs_a_missing_package_is_skipped_in_one_line(tmp_path, monkeypatch, capsys):
    needy = run.Section("decoders", "tests.gpu.no_such_helper", ("no_such_package",))
    monkeypatch.setitem(run.PARTS, "off", (needy,))
    assert run.main(["off", "--device", "cpu", "--report", str(tmp_path / "report.json")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped")]
    assert line.startswith("skipped decoders: no_such_package is not importable")


def test_a_section_that_cannot_be_imported_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(run.PARTS, "off", (run.Section("decoders", "tests.gpu.no_such_helper"),))
    assert run.main(["off", "--device", "cpu", "--report", str(tmp_path / "report.json")]) == 1
