import sys

from regate_ds.training import launcher


def test_the_error_of_a_rank_is_found_in_what_the_launcher_says(tmp_path, monkeypatch, capfd):
    fake = tmp_path / "deepspeed"
    fake.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "sys.stderr.write('bar 1%\\rregate train: no such key\\nTraceback\\n'\n"
        "                 'regate train: Connection closed by peer\\n  more\\n')\n"
        "sys.exit(3)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert launcher.main(["2", "train", "run.yaml"]) == 3
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "exit code 3: regate train: no such key"
    assert "Traceback" in lines
