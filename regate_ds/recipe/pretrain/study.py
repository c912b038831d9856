"""Compare objectives at equal CPU time: `python -m regate_ds.recipe.pretrain.study STUDY`.

Each arm gets as many steps as fit the CPU seconds, by the cost of its steps measured in turns with
the others; then a probe reads what its frozen states tell. One JSON line for each run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regate_ds.job.process import Process
from regate_ds.job.supervise import join_job
from regate_ds.objectives.contract import TokenRows
from regate_ds.recipe.pretrain.config import PretrainTree, load_pretrain
from regate_ds.recipe.pretrain.probe import accuracy, fitted_scores, mean_ranking, pooled_states
from regate_ds.recipe.pretrain.rows import PretrainRows, RowSource, open_rows, read_captions
from regate_ds.recipe.pretrain.trainer import Pretraining
from regate_ds.recipe.pretrain.wordnet import read_glosses
from regate_ds.recipe.tasks.text.documents import hold_out

CONFIGS = Path("configs/pretrain")
STUDIES = {
    "text": ("masked", "replaced_token", "multi_choice", "causal", "free_language_modeling"),
    "pictures": ("masked", "causal", "free_language_modeling"),
}
_TIMED_STEPS = 6
_PROBED = 6000
"""Held-out samples that the probe reads, at most; two thirds of them fit it."""

Probe = Callable[[torch.nn.Module], dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, time the arms, and train each for the same CPU seconds on every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="wordnet, or regate data digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=22.0, help="CPU seconds of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="instead of that of each arm's configuration")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with join_job("pretrain") as process:
        data = _text_data(args) if args.study == "text" else _picture_data(args)
        _compare(args, process, *data)


def _compare(
    args: argparse.Namespace, process: Process, overrides: list[str], rows: PretrainRows, probe: Any
) -> None:
    rate = [] if args.lr is None else [f"optimizer.lr={args.lr}"]
    configs = {
        name: load_pretrain(
            CONFIGS / f"{name}.yaml",
            [*overrides, *rate, f"run.out={args.out / name}", "run.eval_rows=128"],
        )
        for name in STUDIES[args.study]
    }
    timed = args.out / "costs.json"
    if not timed.is_file():
        timed.write_text(json.dumps(_costs(configs, rows, process)))
    costs = json.loads(timed.read_text())
    print(json.dumps({"cpu_seconds_of_a_step": costs}), flush=True)
    for seed in args.seeds:
        for name, config in configs.items():
            out = args.out / f"{name}-{seed}"
            steps = max(1, round(args.seconds / costs[name]))
            if not (out / "summary.json").is_file():
                run = replace(config.run, out=out, steps=steps, seed=seed, resume="auto")
                made = Pretraining(replace(config, run=run), process, rows)
                # What states tell that nothing has been learnt for.
                before = {} if seed else probe(made.engine.module)
                summary = made.run()
                result = {"arm": name, "seed": seed, **summary, **probe(made.engine.module)}
                result |= {f"untrained_{key}": value for key, value in before.items()}
                (out / "result.json").write_text(json.dumps(result))
            print((out / "result.json").read_text(), flush=True)


def _costs(
    configs: dict[str, PretrainTree], rows: PretrainRows, process: Process
) -> dict[str, float]:
    """Return the CPU seconds of a step of each arm; the arms take turns."""
    made = {name: Pretraining(config, process, rows) for name, config in configs.items()}
    spent = dict.fromkeys(made, 0.0)
    for turn in range(_TIMED_STEPS + 1):
        for name, run in made.items():
            numbers = list(range(turn * 16, turn * 16 + run.config.run.micro_batch))
            start = time.process_time()
            run.engine.run_step([run.asked(rows.train, numbers, turn)])
            if turn:  # The first also builds what the others find ready.
                spent[name] += time.process_time() - start
    return {name: seconds / _TIMED_STEPS for name, seconds in spent.items()}


def _text_data(args: argparse.Namespace) -> tuple[list[str], PretrainRows, Probe]:
    """WordNet's glosses; of those that are held out, the probe tells the lexicographer's file."""
    glosses = read_glosses(args.data)
    path = args.out / "glosses.txt"
    path.write_text("".join(f"{one.text}\n" for one in glosses))
    overrides = [f"data.path={path}"]
    rows = open_rows(load_pretrain(CONFIGS / "masked.yaml", overrides).data)
    kinds = {one.text: one.kind for one in glosses}
    _, held_out = hold_out([one.text for one in glosses], share=0.05)
    texts = list(dict.fromkeys(held_out))
    order_N = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    texts = [texts[n] for n in order_N[:_PROBED]]
    encoded = rows.tokenizer(texts, add_special_tokens=False)["input_ids"]
    source = replace(rows.held_out, ids=[torch.tensor(one[:48]) for one in encoded])
    kind_N = torch.tensor([kinds[text] for text in texts])
    wanted_NC = torch.nn.functional.one_hot(kind_N, 45).double()
    cut = len(texts) * 2 // 3

    def probe(module: torch.nn.Module) -> dict[str, float]:
        states_NH = pooled_states(module, _batches(source), of_patches=False)
        scores = fitted_scores(states_NH[:cut], wanted_NC[:cut], states_NH[cut:])
        return {"accuracy": accuracy(scores, kind_N[cut:])}

    return overrides, rows, probe


def _picture_data(args: argparse.Namespace) -> tuple[list[str], PretrainRows, Probe]:
    """The digits with all that is said of them; the probe tells which digits a picture shows."""
    path, scenes = _captions(args.data)
    overrides = [
        f"data.path={path}",
        "data.pictures=true",
        "data.patch=32",
        "data.vocab_size=400",
        "data.held_out=0.3",
    ]
    rows = open_rows(load_pretrain(CONFIGS / "masked.yaml", overrides).data)
    _, held_out = hold_out(list(read_captions(path)), share=0.3)
    end = rows.tokenizer.eos_token_id
    source = replace(rows.held_out, ids=[torch.tensor([end])] * len(held_out))
    holds_NC = torch.stack([scenes[json.loads(line)["image"]] for line in held_out])
    cut = len(held_out) * 2 // 3

    def probe(module: torch.nn.Module) -> dict[str, float]:
        states_NH = pooled_states(module, _batches(source), of_patches=True)
        scores = fitted_scores(states_NH[:cut], holds_NC[:cut], states_NH[cut:])
        digits, colours = scores[:, :10], scores[:, 10:]
        return {
            "digits": mean_ranking(digits, holds_NC[cut:, :10]),
            "colours": mean_ranking(colours, holds_NC[cut:, 10:]),
        }

    return overrides, rows, probe


def _captions(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a line for each scene, and return for each picture the digits and colours in it."""
    from regate_ds.recipe.tasks.digits.questions import DIGITS
    from regate_ds.recipe.tasks.digits.scenes import COLOURS

    records = json.loads((folder / "train.json").read_text())
    path, scenes = folder / "captions.jsonl", {}
    with path.open("w") as file:
        for record in records:
            said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
            line = {"image": record["image"], "text": " ".join(said)}
            file.write(json.dumps(line) + "\n")
            shown = record["scene"]
            has = [float(any(one["digit"] == digit for one in shown)) for digit in DIGITS]
            has += [float(any(one["colour"] == name for one in shown)) for name in COLOURS]
            scenes[record["image"]] = torch.tensor(has, dtype=torch.float64)
    return path, scenes


def _batches(source: RowSource) -> list[TokenRows]:
    numbers = range(len(source))
    return [source.rows(list(numbers[at : at + 64])) for at in range(0, len(source), 64)]


if __name__ == "__main__":
    main()
