"""Checks on a borrowed machine, with whatever python and torch are there (``make test-gpu``).

    python -m tests.gpu.run oracle        the method's arithmetic against slow, plain oracles
    python -m tests.gpu.run off           what is switched off changes nothing, bit for bit
    python -m tests.gpu.run zero          a step under each ZeRO stage, on one rank
    python -m tests.gpu.run megatron      a step of a Megatron-core model
    python -m tests.gpu.run step          time, memory and waits of a step: `regate bench step`
    python -m tests.gpu.run loss          the loss against plain logits and others' kernels

Nothing is installed. What needs a package that is not there is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check_helper import Check, Result, Skipped, run_check
from tests.gpu.place_helper import (
    device_name,
    full_fp32,
    leave,
    prepare_environment,
    why_missing,
)


@dataclass(frozen=True)
class Section:
    """A module with a function of the part's name, (device) -> checks, and what it imports."""

    title: str
    module: str
    needs: tuple[str, ...] = ()


ALGORITHM = Section("algorithm", "tests.gpu.algorithm_helper")
ENGINE = Section("engine", "tests.gpu.engine_helper", ("transformers", "PIL", "deepspeed"))
MEGATRON = Section("megatron", "tests.gpu.megatron_helper", ("megatron.core",))
PARTS = {
    "oracle": (
        ALGORITHM,
        Section("decoders", "tests.gpu.decoder_helper", ("transformers",)),
        ENGINE,
        # Last: on a CPU it puts stand-ins for CUDA into torch.
        MEGATRON,
    ),
    "off": (
        ALGORITHM,
        Section("decoders", "tests.gpu.decoder_off_helper", ("transformers", "PIL")),
        ENGINE,
    ),
    "zero": (ENGINE,),
    "megatron": (MEGATRON,),
    "step": (Section("step", "tests.gpu.step_helper", ("transformers",)),),
    "loss": (Section("loss", "tests.gpu.loss_helper"),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a check failed, else 0."""
    args = _parser().parse_args(arguments)
    prepare_environment()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begin = time.monotonic()
    print(f"{args.part} on {device_name(device)}, torch {torch.__version__}", flush=True)
    results, skipped = run_all(items(args.part, device, args.only))
    seconds = round(time.monotonic() - begin, 1)
    failed = [result for result in results if not result.passed]
    report = {
        "part": args.part,
        **place(device),
        "seconds": seconds,
        "passed": len(results) - len(failed),
        "failed": len(failed),
        "checks": [finite(asdict(result)) for result in results],
        "skipped": [asdict(item) for item in skipped],
    }
    write(report, Path(args.report or f"build/gpu-{args.part}.json"))
    print(*table(results), sep="\n")
    print(*(f"FAILED {line(result)}" for result in failed), sep="\n", end="\n" if failed else "")
    counts = f"{len(results) - len(failed)} passed, {len(failed)} failed, {len(skipped)} skipped"
    print(f"{counts} in {seconds} s")
    return 1 if failed else 0


def run_all(to_do: Iterable[Check | Skipped]) -> tuple[list[Result], list[Skipped]]:
    """What fails and what is skipped is said at once."""
    results: list[Result] = []
    skipped: list[Skipped] = []
    try:
        with full_fp32():
            for item in to_do:
                if isinstance(item, Skipped):
                    skipped.append(item)
                    print(f"skipped {item.what}: {item.why}", flush=True)
                    continue
                results.append(run_check(item))
                if not results[-1].passed:
                    print(f"FAILED {line(results[-1])}", flush=True)
    finally:
        leave()
    return results, skipped


def items(part: str, device: torch.device, only: str | None) -> Iterator[Check | Skipped]:
    for section in PARTS[part]:
        if only not in (None, section.title):
            continue
        missing = [why for package in section.needs if (why := why_missing(package))]
        if missing:
            yield Skipped(section.title, missing[0])
            continue
        # Found broken only now; what imports it must not stop the other sections.
        try:
            checks = getattr(import_module(section.module), part)(device)
        except ImportError as problem:
            yield Check(section.title, "-", _raiser(problem))
            continue
        for item in checks:
            prefix = f"{section.title}: "
            if isinstance(item, Skipped):
                yield Skipped(prefix + item.what, item.why)
            else:
                yield replace(item, name=prefix + item.name)


def _raiser(problem: Exception) -> Any:
    def measure() -> Any:
        raise problem

    return measure


def line(result: Result) -> str:
    subject = f", {result.subject}" if result.subject else ""
    shown = "" if result.error is None else f" error {result.error:.1e} > {result.bound:.1e}"
    return f"{result.name}{subject} ({result.dtype}):{shown} {result.note}".rstrip()


def table(results: Sequence[Result]) -> Iterator[str]:
    """A row for each check and precision, over all subjects; the error is the largest."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.name, result.dtype), []).append(result)
    for (name, dtype), group in groups.items():
        num_passed, seconds = sum(r.passed for r in group), sum(r.seconds for r in group)
        errors = [r.error for r in group if r.error is not None]
        error = f"{max(errors):.1e}" if errors else "-"
        yield f"{num_passed:3}/{len(group):<3} {dtype:6} {error:8} {seconds:6.1f} s  {name}"


def place(device: torch.device) -> dict[str, Any]:
    packages = ("numpy", "transformers", "deepspeed", "megatron.core", "flash_attn")
    loaded = {name: sys.modules[name] for name in packages if name in sys.modules}
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {n: str(getattr(m, "__version__", "?")) for n, m in loaded.items()},
    }


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.run")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    titles = dict.fromkeys(section.title for part in PARTS.values() for section in part)
    parser.add_argument("--only", choices=titles, help="one section of the part")
    parser.add_argument("--report", help="build/gpu-PART.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
