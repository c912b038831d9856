"""Write docs/models.md from the rows of ``tests.families.run``:

    python -m tests.families.page ROWS.jsonl

Only rows of a whole run make the page; it says what was compared, not what is believed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from regate_ds.families.hosts import HOSTS, supported_as
from tests.families.run import RANGES, TOLERANCE
from tests.families.zoo.models.left_out import LEFT_OUT
from tests.families.zoo.models.table import FAMILIES
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
Row = dict[str, Any]

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
{worst:.0e}. The rows are of `execution: elide`; the same command runs
`mlp_only`, `backward_only` and `random_ltd` too, and fails if one is wrong. A class that takes any
of several decoders was run with those in its row.
torch {torch}, transformers {transformers}, CPU. Not run: GPUs, flash_attention_2, real checkpoints.

"Packed" says whether a row may hold several samples: "refused" where the host itself lets them
see each other (seen, or a recurrent layer), or where its own mask decides.
"""

_WITH_IMAGES = """
## Models with images

"Empty image": whether a micro-batch without an image is known to run an empty one, which several
ranks need; else every micro-batch needs an image. With it, the ranks of ZeRO-3 also run the tower
equally often where one has images and videos and another has not (`python -m tests.families.zero`);
without it such a micro-batch is refused there. "Told apart": whether images are numbered from
the inputs where image tokens are elided; else the collate function numbers them (docs/images.md).

| class | decoder | runs | packed | empty image | told apart |
| --- | --- | --- | --- | --- | --- |
"""

_TEXT = """
## Models of text

| class | decoder | runs | packed |
| --- | --- | --- | --- |
"""

_REFUSED = """
## Refused

Every one in a line of its own, before anything is changed. Of most nobody has tried more than that.

"""

_LEFT = """
## Not tried

| model_type | why |
| --- | --- |
"""


def main() -> int:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    missing = FAMILIES.keys() - {row["family"] for row in rows}
    if missing:
        print(f"the rows lack {sorted(missing)}: run the families without names", file=sys.stderr)
        return 1
    PAGE.write_text(page(rows))
    return 0


def page(rows: list[Row]) -> str:
    """Return the page; ValueError if a class is taken and not exact."""
    wrong = [row["family"] for row in rows if row.get("accepted") and row["verdict"] != "exact"]
    if wrong:
        raise ValueError(f"these are accepted, but not exact: {wrong}")
    exact = [row for row in rows if row["verdict"] == "exact"]
    if unseen := HOSTS.keys() - {row["class"] for row in exact}:
        raise ValueError(f"these have a line in HOSTS, but no row: {sorted(unseen)}")
    images = [row for row in exact if row["images"]]
    text = [row for row in exact if not row["images"]]
    head = _HEAD.format(
        ranges=", ".join(f"[{one.start}, {one.stop})" for one in RANGES),
        tolerance=TOLERANCE,
        worst=max(row["gradient_error"] for row in exact),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )
    taken = {row["class"] for row in exact}
    refused = [r for r in rows if r["verdict"] == "refused" and r["class"] not in taken]
    left = (f"| {name} | {reason} |\n" for name, reason in sorted(LEFT_OUT.items()))
    return "".join(
        [head, _WITH_IMAGES, *_lines(images), _TEXT, *_lines(text), _REFUSED]
        + [f"{_names(refused)}\n", _LEFT, *left]
    )


def _lines(rows: list[Row]) -> Iterable[str]:
    by_class: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_class[row["class"]].append(row)
    for name, same in sorted(by_class.items()):
        decoders = ", ".join(sorted({row["decoder"] for row in same}))
        cells = [name, decoders, str(sum(row["runs"] for row in same)), _packed(same)]
        if same[0]["images"]:
            cells += [_yes(same, "empty_image"), _yes(same, "told_apart")]
        yield f"| {' | '.join(cells)} |\n"


def _packed(rows: list[Row]) -> str:
    found = {_packs(row) for row in rows}
    return "by decoder" if len(found) > 1 else "exact" if found.pop() else "refused"


def _packs(row: Row) -> bool:
    """Return whether packed rows are accepted; then the family's cases have had some."""
    text = FAMILIES[row["family"]].config().get_text_config(decoder=True)
    return supported_as(row["class"], text).packs


def _yes(rows: list[Row], what: str) -> str:
    found = {row[what] for row in rows}
    return found.pop() if len(found) == 1 else "by decoder"


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["class"] for row in rows})) + "."


if __name__ == "__main__":
    raise SystemExit(main())
