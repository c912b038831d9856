import json
from pathlib import Path

import pytest

from regate_ds.recipe.reports.compare import compare_runs, table
from regate_ds.recipe.run_folder import RunFolder

SUMMARY = {
    "accuracy_visual": 0.6125,
    "accuracy_plain": 0.975,
    "answer_tokens_processed": 1234.4,
    "image_tokens_processed": 3456.0,
    "tokens_processed": 5678.0,
    "train_cpu_seconds": 20.0,
    "train_seconds": 10.04,
    "step_seconds_dense": 0.1234,
    "step_seconds_sparse": None,
    "peak_memory_bytes": 512_000_000,
}


def finished(path, config="", **changes):
    folder = RunFolder(path)
    folder.begin(config)
    for done in (0, 10):
        folder.append_eval(
            {"step": done, "accuracy_visual": 0.5, "tokens_processed": done, "train_seconds": done}
        )
    folder.write_summary({**SUMMARY, **changes})
    return path


def cells(text):
    head, _, *rows = (line.split("  ") for line in text.splitlines())
    clean = [[cell.strip() for cell in row if cell.strip()] for row in (head, *rows)]
    return [dict(zip(clean[0], row, strict=True)) for row in clean[1:]]


def test_the_table_has_one_row_for_each_run_and_a_dash_for_what_is_missing():
    (row, bare) = cells(table({"dense": SUMMARY, "bare": {"steps": 3}}))
    assert row == {
        "run": "dense",
        "image words": "0.613",
        "other words": "0.975",
        "answer tok.": "1234",
        "image tok.": "3456",
        "all tokens": "5678",
        "s/dense": "0.123",
        "s/sparse": "-",
        "train s": "10.0",
        "train CPU s": "20.0",
        "peak MB": "512",
    }
    assert set(bare.values()) == {"bare", "-"}


def test_a_value_of_zero_is_not_a_missing_one():
    (row,) = cells(table({"run": {**SUMMARY, "accuracy_visual": 0.0}}))
    assert row["image words"] == "0.000"


def test_an_accuracy_that_was_not_measured_is_a_dash():
    (row,) = cells(table({"run": {**SUMMARY, "accuracy_visual": None}}))
    assert row["image words"] == "-"


def test_columns_stand_under_each_other():
    lines = table({"a": SUMMARY, "a_much_longer_name": {}}).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_json_holds_each_run_under_its_folders_name_with_all_figures(tmp_path):
    runs = [finished(tmp_path / "dense"), finished(tmp_path / "regate", accuracy_visual=0.7)]
    text = compare_runs(runs, out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content == {"runs": {"dense": SUMMARY, "regate": {**SUMMARY, "accuracy_visual": 0.7}}}
    assert [row["run"] for row in cells(text)] == ["dense", "regate"]


def test_pictures_are_drawn_where_there_is_an_out_folder(tmp_path):
    compare_runs([finished(tmp_path / "dense")], out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "accuracy_over_tokens.png",
        "accuracy_over_time.png",
        "accuracy_over_cpu_time.png",
        "tokens_by_kind.png",
    }


def test_without_an_out_folder_nothing_is_written(tmp_path):
    run = finished(tmp_path / "dense")
    before = set(tmp_path.rglob("*"))
    compare_runs([run])
    assert set(tmp_path.rglob("*")) == before


def test_a_run_is_named_by_its_folder_however_the_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(finished(tmp_path / "dense"))
    (row,) = cells(compare_runs([Path(".")]))
    assert row["run"] == "dense"


def test_settings_that_differ_besides_the_methods_own_are_noted(tmp_path):
    text = "run: {{out: {0}, steps: 4}}\noptimizer: {{lr: {1}}}\nelision: {{keep_share: {1}}}\n"
    runs = [
        finished(tmp_path / name, text.format(name, lr), world_size=2)
        for name, lr in (("dense", 0.1), ("regate", 0.5))
    ]
    notes = [line for line in compare_runs(runs).splitlines() if line.startswith("note")]
    assert notes == ["note: optimizer.lr differs: dense 0.1, regate 0.5"]


def test_two_runs_of_one_name_are_refused(tmp_path):
    runs = [finished(tmp_path / "a" / "dense"), finished(tmp_path / "b" / "dense")]
    with pytest.raises(ValueError, match="holds a name twice"):
        compare_runs(runs)


def test_a_folder_that_is_not_a_finished_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing has no summary.json"):
        compare_runs([tmp_path / "nothing"])
