"""The pages: blocks of code are run by a test or say that they are not; what is named exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

NOT_RUN = "<!-- not run"
PRINTED = re.compile(r"\bprinted\b")
"""In the line above what a command wrote: nothing that a reader could run."""

PAGES_RUN = "tests/house/test_pages.py"
LOOPS_RUN = "tests/adapters/torch/pages_helper.py"

RUN_BY = {
    "README.md": {
        "make test": ".ci/run",
        "engine, _, loader, _ = deepspeed.initialize(": "tests/recipe/readme_example_helper.py",
    },
    "add_a_method.md": {
        "class Progress:": PAGES_RUN,
        "+from regate_ds.algorithm.scores.progress import Progress": PAGES_RUN,
        "def plain_value(": PAGES_RUN,
    },
    "add_a_model.md": {
        '+    "lfm2_moe": _CONVOLUTION,': PAGES_RUN,
        '+    "MiniCPMOcrForConditionalGeneration"': PAGES_RUN,
        '+        model_type="minicpm_ocr",': PAGES_RUN,
    },
    "add_a_framework.md": {
        "class Decoder(nn.Module):": PAGES_RUN,
        "class PlainTorchRegate:": PAGES_RUN,
        '+    "plain_torch": ': PAGES_RUN,
        "def plain_loss(": PAGES_RUN,
    },
    "configuration.md": {
        "train_tokenizer(texts, vocab_size=448)": "tests/recipe/config/test_tree.py",
        "path: null": "tests/recipe/config/test_tree.py",
    },
    "trainer.md": {
        "teacher = Teacher(": "launch/examples/hf_trainer.py",
        "trainer = RegateTrainer(": "launch/examples/hf_trainer.py",
    },
    "deepspeed_loop.md": {
        "teacher = Teacher(": "launch/examples/deepspeed_loop.py",
        "regate = attach(": "launch/examples/deepspeed_loop.py",
    },
    "loops.md": {
        "quota=PerWindow(": "tests/house/test_docs.py",
        "with watch_ranks(": "tests/job/test_watch_ranks.py",
    },
    "megatron_bridge.md": {
        "export PYTHONPATH=": "tests/adapters/megatron_bridge/test_page.py",
    },
    "streams.md": {"shards = wds.WebDataset(": "tests/data/test_streams.py"},
    "peft.md": {
        "model = get_peft_model(": "tests/adapters/huggingface/test_lora.py",
    },
    "trl.md": {
        "+    regate=config,": "tests/adapters/trainers/trl_page_helper.py",
    },
    "llamafactory.md": {
        "with installed_in_llama_factory(": "tests/adapters/llama_factory/test_llama_factory.py",
        "model_name_or_path: student": "tests/adapters/llama_factory/test_llama_factory.py",
        "python regate_train.py job.yaml": "tests/adapters/llama_factory/test_llama_factory.py",
    },
    "swift.md": {
        "install_in_swift(RegateConfig()": "tests/adapters/ms_swift/test_ms_swift.py",
        "--external_plugins regate_plugin.py": "tests/adapters/ms_swift/test_ms_swift.py",
    },
    "torch_loop.md": {
        "+    for window in regate.windows(": LOOPS_RUN,
        "ddp = DistributedDataParallel(model)": LOOPS_RUN,
    },
    "fsdp2_loop.md": {
        "+    for window in regate.windows(": LOOPS_RUN,
        "dcp.save(state, checkpoint_id=folder)": LOOPS_RUN,
    },
    "accelerate_loop.md": {
        "+    for window in regate.windows(": LOOPS_RUN,
        "accelerator.register_for_checkpointing(regate)": LOOPS_RUN,
        "accelerator.log(": "tests/adapters/trainers/test_trackers.py",
    },
    "images.md": {
        "images=ImagesConfig(keep_share=0.25)": "tests/recipe/config/test_elision.py",
        "images: {keep_share: 0.25, ranking: random}": "tests/recipe/config/test_elision.py",
    },
}
"""Page, a line of the block, and what runs it: a test, or a script that a test runs, which then has
the block word for word."""

EXAMPLES = "launch/examples/"

TOUR = [ROOT / "README.md", ROOT / "docs" / "one_step.md"]
"""Pages whose every ``path.py`` and ``path.py:name`` is checked."""

NAMED = re.compile(r"`([\w./-]+\.py)(?::([\w.]+))?`")
"""A Python file and, after a colon, what it defines."""

OURS = re.compile(r"(?<![\w./])(?:regate_ds|tests|launch|configs|docs|patches)/[\w./-]*\w/?")
"""A path from the repository's root."""

LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
"""A link to another page, from the page's own folder."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block of code, and the line above it. Indented ones start after an empty line."""
    lines, found = page.read_text().splitlines(), []
    number = 0
    while number < len(lines):
        is_fence = lines[number].lstrip().startswith("```")
        is_indented = lines[number].startswith("    ") and number and not lines[number - 1].strip()
        if not is_fence and not is_indented:
            number += 1
            continue
        above, start = _above(lines, number), number + is_fence
        number = start
        while number < len(lines) and not _ends(lines[number], is_fence):
            number += 1
        found.append(("\n".join(lines[start:number]), above))
        number += 1
    return found


def _ends(line: str, is_fence: bool) -> bool:
    return line.lstrip().startswith("```") if is_fence else not line.startswith("    ")


def _above(lines: list[str], number: int) -> str:
    return next((line for line in reversed(lines[:number]) if line.strip()), "")


CODE = [(page, block, above) for page in PAGES for block, above in blocks(page)]


@pytest.mark.parametrize(("page", "block", "above"), CODE, ids=lambda x: getattr(x, "name", None))
def test_a_block_is_run_or_says_that_it_is_not(page: Path, block: str, above: str):
    if above.startswith(NOT_RUN) or PRINTED.search(above):
        return
    runners = [by for line, by in RUN_BY.get(page.name, {}).items() if line in block]
    assert runners, (
        f"{page.name}: run this block by a test and name it in RUN_BY, or write "
        f"'{NOT_RUN}: why -->' above it:\n{block}"
    )
    runner = (ROOT / runners[0]).read_text()
    if runners[0].startswith(EXAMPLES):
        assert block in runner, f"{runners[0]} has it otherwise:\n{block}"


@pytest.mark.parametrize("page", RUN_BY)
def test_what_runs_a_block_is_named_for_blocks_that_are_there(page: str):
    (path,) = (path for path in PAGES if path.name == page)
    text = path.read_text()
    for line, by in RUN_BY[page].items():
        assert line in text, f"{page} no longer has {line!r}"
        assert (ROOT / by).is_file()


def test_the_settings_in_python_are_a_configuration():
    page = ROOT / "docs" / "loops.md"
    (block,) = (block for block, _ in blocks(page) if "quota=PerWindow(" in block)
    made: dict[str, Any] = {}
    exec(block, made)
    assert (made["config"].keep_share, made["config"].quota.floor) == (0.4, 0.2)


def defines(body: list[ast.stmt], name: str) -> bool:
    """Whether a module, or a class in it, defines ``name``; dots lead into classes."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first:
            return defines(node.body, rest) if rest else True
    return False


@pytest.mark.parametrize("page", TOUR, ids=lambda page: page.name)
def test_files_and_functions_that_a_page_leads_through_exist(page: Path):
    named = NAMED.findall(page.read_text())
    assert named
    for file, name in named:
        path = ROOT / file
        assert path.is_file(), f"{page.name} names {file}, which is not there"
        assert not name or defines(ast.parse(path.read_text()).body, name), f"{file} lacks {name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_and_links_of_a_page_lead_somewhere(page: Path):
    text = page.read_text()
    lost = [path for path in OURS.findall(text) if not (ROOT / path).exists()]
    lost += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not lost, f"{page.name} names {lost}"


def test_the_index_lists_every_page():
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= listed, f"docs/index.md lacks {sorted(pages - listed)}"
