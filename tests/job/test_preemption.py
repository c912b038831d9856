import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from regate_ds.job.preemption import SIGNALS, leave_to_parent, listening, restore_signals


def wait_for(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_ends_nothing(number):
    with listening() as stop:
        assert not stop.is_asked
        os.kill(os.getpid(), number)
        assert wait_for(lambda: stop.is_asked)


def test_the_end_of_a_loaders_workers_is_no_request():
    loader = DataLoader(list(range(4)), num_workers=1, worker_init_fn=leave_to_parent)
    ended = []
    with listening() as stop:
        assert len(list(loader)) == 4
        # torch sets this handler with its first worker, and it wakes whoever waits for signals.
        before = signal.signal(signal.SIGCHLD, lambda *_: ended.append(True))
        os.kill(os.getpid(), signal.SIGCHLD)
        assert wait_for(lambda: ended)
        assert not wait_for(lambda: stop.is_asked, seconds=0.2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait_for(lambda: stop.is_asked)
        signal.signal(signal.SIGCHLD, before)


def test_signals_do_what_they_did_before_once_the_run_is_over():
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening(grace_seconds=1):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    time.sleep(1.2)


def child(code: str) -> subprocess.Popen[str]:
    lines = f"import os, signal, time\nfrom regate_ds.job.preemption import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", lines], stderr=subprocess.PIPE, text=True)


def test_a_run_that_does_not_save_in_time_ends_even_while_it_waits_in_foreign_code():
    # pause() holds the main thread as a collective does: no Python handler runs.
    process = child(
        "from ctypes import CDLL\n"
        "with listening(0.2):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while True: CDLL(None).pause()\n"
    )
    assert "not saved within run.grace_seconds=0.2" in process.communicate(timeout=60)[1]
    assert process.returncode == 143


def test_a_worker_leaves_the_signals_to_its_parent():
    process = child(
        "leave_to_parent()\n"
        "for number in SIGNALS: os.kill(os.getpid(), number)\n"
        "raise SystemExit(9)\n"
    )
    process.communicate(timeout=60)
    assert process.returncode == 9


def test_a_signal_that_launchers_ignore_ends_a_command_that_does_not_listen():
    process = child(
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nrestore_signals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(60)\n"
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGUSR1


def test_a_users_own_handler_stays():
    before = signal.signal(signal.SIGUSR1, own := lambda *_: None)
    restore_signals()
    assert signal.signal(signal.SIGUSR1, before) is own
