"""The deepspeed launcher over ssh to 127.0.0.2 and 127.0.0.3; `make test-ssh` runs it.

Nothing here may end a pdsh launch from outside: deepspeed would then end, by name, every launch
like it on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regate_ds.job.deepspeed_launcher import free_port
from tests.cluster.jobs import FAILURE, ROOT, passed, prepare, summary, training, wait_for
from tests.cluster.programs import started

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
HOSTS = ("127.0.0.2", "127.0.0.3")

_SSHD = """
Port {port}
ListenAddress {hosts[0]}
ListenAddress {hosts[1]}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile {folder}/sshd.pid
"""


@dataclass(frozen=True)
class Nodes:
    """Starts launch/deepspeed.sh, from a folder that is not the repository's."""

    folder: Path
    environment: dict[str, str]

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        script = [str(ROOT / "launch" / "deepspeed.sh"), str(self.folder / "hostfile"), *command]
        environment = {**self.environment, "MASTER_PORT": str(free_port()), **variables}
        return subprocess.Popen(
            script, env=environment, cwd=self.folder, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        """Exit code, and what the script wrote to the console."""
        process = self.start(*command, **variables)
        errors = process.communicate()[1]
        return process.returncode, errors


def check_teacher(nodes: Nodes) -> None:
    code, errors = nodes.run("teacher", str(nodes.folder / "run.yaml"))
    assert code == 0, errors
    assert (nodes.folder / "store" / "manifest.json").is_file()


def check_training(nodes: Nodes) -> None:
    logs = nodes.folder / "logs-ssh"
    code, errors = nodes.run(*training(nodes.folder, "ssh"), LOGS=str(logs))
    assert code == 0, errors
    assert summary(nodes.folder, "ssh")["world_size"] == 2
    assert len(list(logs.glob("*_rank[01].log"))) == 2
    print("\n".join(f"    {line}" for line in errors.splitlines() if "127.0.0." in line))


def check_failure(nodes: Nodes) -> None:
    """A rank that fails in the middle of a run: the largest code of any node is the launch's."""
    metrics = nodes.folder / "failed" / "metrics.jsonl"
    command = training(nodes.folder, "failed", steps=2000)
    code, errors = nodes.run(*command, FAILING_RANK="1", FAILS_AFTER=str(metrics))
    assert code == FAILURE, (code, errors)
    assert metrics.stat().st_size > 0


def check_usage(nodes: Nodes) -> None:
    """The ranks' own line about a wrong key comes to the console, with their code."""
    code, errors = nodes.run(*training(nodes.folder, "wrong"), "run.stepps=3")
    assert code == 1, (code, errors)
    assert "did you mean run.steps?" in errors.splitlines()[-2]


def check_no_ssh(nodes: Nodes) -> None:
    """Started once on each node."""
    port = str(free_port())
    command = training(nodes.folder, "no-ssh")
    both = [nodes.start(*command, NODE_RANK=rank, MASTER_PORT=port) for rank in ("0", "1")]
    for process in both:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert summary(nodes.folder, "no-ssh")["world_size"] == 2


@contextmanager
def ssh_nodes(folder: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    ours = folder / "ssh"
    ours.mkdir()
    port = free_port()
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ours / name)]
        subprocess.run(keygen, check=True)
    (ours / "sshd_config").write_text(_SSHD.format(port=port, hosts=HOSTS, folder=ours))
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    environment = {
        **environment,
        "PDSH_SSH_ARGS_APPEND": f"-i {ours / 'user'} -o IdentitiesOnly=yes {options}",
        "DS_OPTIONS": f"--ssh_port {port} --no_ssh_check",
        "MASTER_ADDR": HOSTS[0],
        "FORWARD": "^(DS|OMP|FAIL[A-Z]*)_",
    }
    # Where sshd puts its unprivileged half; the package's own service would have made it.
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = [str(shutil.which("sshd")), "-D", "-e", "-f", str(ours / "sshd_config")]
    with (ours / "sshd.log").open("w") as log, started(sshd, os.environ, log):
        wait_for(lambda: "listening on 127.0.0.3" in (ours / "sshd.log").read_text(), "sshd", 20)
        yield Nodes(folder, environment)


def lacks() -> str:
    """Why nothing can be started here; "" if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install openssh-server pdsh"
    return "" if os.geteuid() == 0 else "sshd needs root"


def main() -> int:
    reason = lacks()
    if reason:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ssh-") as name:
        folder = Path(name)
        with ssh_nodes(folder, prepare(folder)) as nodes:
            for what, check in (
                ("teacher job on two nodes", check_teacher),
                ("training on two nodes", check_training),
                ("exit code of a rank that fails", check_failure),
                ("error line of the ranks", check_usage),
                ("training without ssh", check_no_ssh),
            ):
                since = time.monotonic()
                check(nodes)
                passed(what, since)
    print("test-ssh: all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
