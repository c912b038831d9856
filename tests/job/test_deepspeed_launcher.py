import os
import signal
import sys
import threading
import time

from regate_ds.job import deepspeed_launcher as launcher


def test_the_error_of_a_rank_is_found_in_what_the_launcher_says(tmp_path, monkeypatch, capfd):
    fake = tmp_path / "python"
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


def test_a_signal_reaches_the_ranks_as_a_request_and_passes_by_the_launchers(
    tmp_path, monkeypatch, capfd
):
    rank = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {rank!r}]).returncode)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert launcher.main(["2", "train", "run.yaml"]) == 75
    sender.join()
    assert capfd.readouterr().err.endswith("exit code 75\n")


def test_a_killed_rank_that_said_nothing_is_not_silent(capsys):
    launcher.report(137, "")
    launcher.report(137, "regate train: disk full")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("exit code 137: a rank was killed: by hand, by the system")
    assert lines[1] == "exit code 137: regate train: disk full"
