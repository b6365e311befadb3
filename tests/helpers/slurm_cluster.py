"""A Slurm of two nodes on this one machine, for tests: its own munge, its own ports, all in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CPUS, GPUS, MEMORY_MB = 2, 1, 3000
SBIN = "/usr/sbin:/sbin"


def missing() -> list[str]:
    """Programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def settings(folder: Path) -> str:
    """Text of slurm.conf: nodes that share this host (hence %n), no cgroups, GPUs that are plain files."""
    controller, *slurmds = free_ports(3)
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={MEMORY_MB} "
        f"Gres=gpu:{GPUS} State=UNKNOWN"
        for i, port in enumerate(slurmds, 1)
    )
    return f"""
ClusterName=mea-ray-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=90
OverTimeLimit=0
SchedulerParameters=sched_interval=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run it; gives the environment in which sbatch and the others find it."""
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "gpu0").touch()
    (folder / "slurm.conf").write_text(settings(folder), encoding="utf-8")
    (folder / "gres.conf").write_text(
        f"NodeName=n[1-2] Name=gpu File={folder}/gpu0 Flags=nvidia_gpu_env\n", encoding="utf-8"
    )
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}
    munge = [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"{number}-{command[0]}.out").open("wb") as out:
                running.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.sock").exists(), 30)
        wait_for(lambda: states(env) == ["idle", "idle"], 120)
        yield env
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def states(env: dict[str, str]) -> list[str]:
    """States of the nodes, empty as long as the controller does not answer."""
    output = subprocess.run(["sinfo", "-hN", "-o", "%T"], env=env, capture_output=True, text=True, check=False)
    return output.stdout.split()


def wait_for(done: object, seconds: float) -> None:
    """Wait until ``done()`` is true.

    Raises:
        TimeoutError: It never was.
    """
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.5)
