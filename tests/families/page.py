"""Write docs/models.md from the rows of this folder's programs:

    python -m tests.families.page FOLDER

The folder has elide.jsonl and mlp_only.jsonl of ``tests.families.run``, zero.jsonl and
teachers.jsonl. Only rows of whole runs make the page; it says what was compared, not what is
believed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from regate_ds.families.hosts import HOSTS, Packs, supported_as
from tests.families.rows import TOLERANCE, Row
from tests.families.run import RANGES
from tests.families.uses import USES
from tests.families.zoo.models.left_out import LEFT_OUT
from tests.families.zoo.models.table import FAMILIES
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
PARTS = ("elide", "mlp_only", "zero", "teachers")
"""Names of the files with rows."""

Parts = dict[str, list[Row]]

_HEAD = """\
# Models

Written by `make test-families`: do not edit.

`attach` takes the classes of the first two tables, and refuses every other by name. Support is
keyed by the class and its decoder ([hosts.py](../regate_ds/families/hosts.py),
[text_decoders.py](../regate_ds/families/text_decoders.py)): the same decoder may be right in one
class and wrong in another.

Each was built tiny from its own config class (hidden about 64, 4 layers, its own vision tower)
with large random weights, scales and caps that are not neutral, windows of 8 and mixed layer
types where it has them. In double precision, loss and all gradients were compared with an oracle
that runs the host's own forward on all positions and takes the elided ones out of its attention
masks: in the gated ranges {ranges}, under sdpa and eager where the class has them; with half of
the answers elided, with half of the image tokens too, and with a sparse plan that keeps
everything. "Exact" means relative errors up to {tolerance:g}; the worst of any class here is
{worst:.0e}. `backward_only` and `random_ltd` are run by the same command, and
not shown here. A class that takes any of several decoders was run with those in its row.
torch {torch}, transformers {transformers}, peft {peft}, CPU. Not run: GPUs, flash_attention_2, real
checkpoints.

{columns}
"host" in a cell says that the host itself cannot be used so, whether or not tokens are elided; a
table below has the error.
"""

_COLUMNS = {
    "class": "of transformers, with a language modelling head",
    "decoder": "`model_type` of its text config",
    "runs": "how many comparisons of `execution: elide`, with those of the next three columns",
    "packed": 'whether a row may hold several samples: "text only" where the host misplaces images '
    'of packed samples in its masks, "refused" where it lets samples see each other (seen, or a '
    "recurrent layer)",
    "recomputed": "activation checkpointing, `use_reentrant` false and true; answers are elided, "
    "and images where there are some",
    "LoRA": "the same with adapters of peft on every `nn.Linear` of the decoder's layers, with "
    "activation checkpointing and without",
    "mlp_only": "the same comparisons under that execution",
    "teacher": "losses of labels by the default teacher that is made of the class itself, against "
    "the host's own logits of the text alone",
}
_OF_IMAGES = {
    "empty image": "whether a micro-batch without an image is known to run an empty one, which "
    "several ranks need; else every micro-batch needs an image, and one with images and videos is "
    "refused under ZeRO-3",
    "told apart": "whether images are numbered from the inputs where image tokens are elided; else "
    "the collate function numbers them (docs/images.md)",
    "ZeRO": "stages under which two ranks that see different things had the loss and the gradients "
    "of one process, in fp32: one images and one text of other lengths; where the class takes "
    'videos, also images, videos, both or neither; "-" where that was not run',
}
"""Columns of the tables, with what was compared; the second are of models with images."""

_REFUSED = """
## Refused

Each in a line of its own, before anything is changed. `attach` answers most with "decoder ... is
not supported", because it has no record. So each was tried once, on a few rows of text, as if it
had the record of a usual decoder. The reason is the line that refused it then, or what came of it.
An exact trial is a lead for whoever adds the class ([add_a_model.md](add_a_model.md)), not support.
"""

_LEFT = """
## Not tried

| model_type | why |
| --- | --- |
"""


def main() -> int:
    folder = Path(sys.argv[1])
    parts = {
        part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        for part in PARTS
    }
    for part in ("elide", "mlp_only"):
        if missing := FAMILIES.keys() - {row["family"] for row in parts[part]}:
            print(f"{part} lacks {sorted(missing)}: run it without names", file=sys.stderr)
            return 1
    PAGE.write_text(page(parts))
    return 0


def page(parts: Parts) -> str:
    """Return the page; ValueError if a class is taken and not exact."""
    for part, rows in parts.items():
        taken = [row for row in rows if row.get("accepted", True)]
        if wrong := [row["family"] for row in taken if row["verdict"] != "exact"]:
            raise ValueError(f"{part}: these are accepted, but not exact: {wrong}")
    exact = [row for row in parts["elide"] if row["verdict"] == "exact"]
    if unseen := HOSTS.keys() - {row["class"] for row in exact}:
        raise ValueError(f"these have a line in HOSTS, but no row: {sorted(unseen)}")
    about = [["column", "what was compared"], ["---", "---"], *(_COLUMNS | _OF_IMAGES).items()]
    head = _HEAD.format(
        columns="".join(_line(cells) for cells in about),
        ranges=", ".join(f"[{one.start}, {one.stop})" for one in RANGES),
        tolerance=TOLERANCE,
        worst=max(row["gradient_error"] for row in exact),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        peft=peft.__version__,
    )
    with_images = [row for row in exact if row["images"]]
    text = [row for row in exact if not row["images"]]
    classes = {row["class"] for row in exact}
    refused = [row for row in parts["elide"] if row["class"] not in classes]
    left = (f"| {name} | {reason} |\n" for name, reason in sorted(LEFT_OUT.items()))
    return "".join(
        [head, "\n## Models with images\n\n", *_table(with_images, parts, [*_COLUMNS, *_OF_IMAGES])]
        + ["\n## Models of text\n\n", *_table(text, parts, [*_COLUMNS])]
        + [*_faults(exact), _REFUSED, *_reasons(refused), _LEFT, *left]
    )


def _table(rows: list[Row], parts: Parts, columns: list[str]) -> Iterator[str]:
    yield _line(columns) + _line(["---"] * len(columns))
    for name, same in sorted(_by(rows, "class").items()):
        decoders = ", ".join(sorted({row["decoder"] for row in same}))
        others = {part: [row for row in parts[part] if row["class"] == name] for part in PARTS[1:]}
        cells = {
            "class": name,
            "decoder": decoders,
            "runs": str(sum(row["runs"] for row in same)),
            "packed": _packed(same),
            "recomputed": _used(same, lora=False),
            "LoRA": _used(same, lora=True),
            "mlp_only": _one({row["verdict"] for row in others["mlp_only"]}),
            "teacher": _one({row["verdict"] for row in others["teachers"]}),
            "empty image": _one({row.get("empty_image", "") for row in same}),
            "told apart": _one({row.get("told_apart", "") for row in same}),
            "ZeRO": ", ".join(sorted({str(row["stage"]) for row in others["zero"]})) or "-",
        }
        yield _line([cells[column] for column in columns])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _by(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def _one(found: set[str]) -> str:
    return (found.pop() if len(found) == 1 else "by decoder") if found else "-"


_PACKED: dict[Packs, str] = {"any": "exact", "text": "text only", "none": "refused"}


def _packed(rows: list[Row]) -> str:
    return _one({_PACKED[_packs(row)] for row in rows})


def _packs(row: Row) -> Packs:
    """Return which packed rows are accepted; the family's cases have had some of these."""
    text = FAMILIES[row["family"]].config().get_text_config(decoder=True)
    return supported_as(row["class"], text).packs


def _used(rows: list[Row], *, lora: bool) -> str:
    """Return "exact", or the uses that the host cannot have."""
    found = {
        use.name if row["uses"][use.name].startswith("host: ") else row["uses"][use.name]
        for row in rows
        for use in USES
        if use.lora is lora
    }
    faults = sorted(found - {"exact"})
    return f"host: {', '.join(faults)}" if faults else "exact"


def _faults(rows: list[Row]) -> Iterator[str]:
    """Yield a table of what hosts cannot do, and why, if there is any."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        for use, said in row["uses"].items():
            if said.startswith("host: "):
                found[use, said.removeprefix("host: ")].add(f"{row['class']} ({row['family']})")
    if found:
        yield "\n## What hosts cannot do\n\n" + _line(
            ["use", "error", "class (family of the suite)"]
        )
        yield _line(["---"] * 3)
    for (use, said), classes in sorted(found.items()):
        yield _line([use, said, ", ".join(sorted(classes))])


def _reasons(rows: list[Row]) -> Iterator[str]:
    """Yield a table of reasons with their classes, for those with images and those of text."""
    for title, images in (("With images", True), ("Of text", False)):
        some = [row for row in rows if _has_images(row) is images]
        yield f"\n### {title}\n\n{_line(['why', 'classes'])}" + _line(["---"] * 2)
        for why, same in sorted(_by(some, "reason").items()):
            yield _line([why, ", ".join(sorted({row["class"] for row in same}))])


def _has_images(row: Row) -> bool:
    """Return whether the class takes images, also where the zoo makes none for it."""
    of_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return FAMILIES[row["family"]].make_images is not None or row["class"] in of_images


if __name__ == "__main__":
    raise SystemExit(main())
