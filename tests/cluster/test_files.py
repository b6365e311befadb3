"""The Slurm script and the image under their linters, and every `mea-ray` command in cluster/ under its own parser."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import typer
import yaml

from mea_ray.cli.main import app
from mea_ray.config import load_sweep

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IMAGE_HOME, JOB_FILE, GUIDE = "/home/ray/mea_ray/", "kuberay-job.yaml", "cluster.md"


def read(name: str) -> str:
    folder = ROOT / "docs" if name == GUIDE else CLUSTER
    return (folder / name).read_text(encoding="utf-8")


def tool(name: str) -> str:
    """A program that pip installed beside this interpreter."""
    path = Path(sysconfig.get_path("scripts")) / name
    return str(path) if path.exists() else name


def test_shellcheck_has_nothing_to_say() -> None:
    output = subprocess.run(
        [tool("shellcheck"), "--enable=quote-safe-variables,require-variable-braces", "--exclude=SC2250"]
        + [str(CLUSTER / "slurm.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (output.returncode, output.stdout) == (0, "")
    assert os.access(CLUSTER / "slurm.sh", os.X_OK)


def test_the_batch_script_ends_only_what_it_started() -> None:
    code = [line.partition("#")[0] for line in read("slurm.sh").splitlines()]
    assert not [line for line in code if re.search(r"\bray stop\b|pkill|killall|scancel \"?\$USER", line)]


@pytest.mark.parametrize(
    ("given", "gpus", "store"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, 2, None),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b,MIG-3c"}, 3, None),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_MEM_PER_NODE": "1000"}, 4, 1000 * 1024 * 1024 * 3 // 10),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_MEM_PER_NODE": "0"}, 0, None),
        ({}, 0, None),
    ],
)
def test_ray_uses_the_resources_that_slurm_gave(
    tmp_path: Path, given: dict[str, str], gpus: int, store: int | None
) -> None:
    """The part that runs on each node, with a `ray` that writes down how it was called, and what is left behind."""
    stub, log, scratch = tmp_path / "bin" / "ray", tmp_path / "called", tmp_path / "scratch"
    stub.parent.mkdir()
    scratch.mkdir()
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\n', encoding="utf-8")
    stub.chmod(0o755)
    function = re.search(r"^ray_node\(\) \{\n.*?^\}\n", read("slurm.sh"), re.DOTALL | re.MULTILINE)
    assert function
    env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "tmp": str(scratch), "SLURM_CPUS_PER_TASK": "6"}
    script = f"set -euo pipefail\n{function[0]}\nray_node --address=head:1"
    subprocess.run(["bash", "-c", script], env=env | given, check=True, timeout=60)
    called = log.read_text(encoding="utf-8").split()
    assert called[:2] == ["start", "--address=head:1"]
    assert {"--block", "--num-cpus=6", f"--num-gpus={gpus}"} <= set(called)
    assert [one for one in called if "object-store" in one] == ([f"--object-store-memory={store}"] if store else [])
    assert not scratch.exists()

    from ray.scripts.scripts import start

    start.make_context("start", called[1:])


@pytest.mark.parametrize("there", ["nothing", "our own folder", "a link", "a file"])
def test_rays_folder_on_a_node_is_ours_alone(tmp_path: Path, there: str) -> None:
    """As on a node where somebody was faster, and put a link in the place of the folder."""
    stub, log, scratch = tmp_path / "bin" / "ray", tmp_path / "called", tmp_path / "scratch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nstat -c %a "{scratch}" > {log}\n', encoding="utf-8")
    stub.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if there == "our own folder":
        scratch.mkdir(mode=0o700)
    elif there == "a link":
        scratch.symlink_to(elsewhere)
    elif there == "a file":
        scratch.touch()
    function = re.search(r"^ray_node\(\) \{\n.*?^\}\n", read("slurm.sh"), re.DOTALL | re.MULTILINE)
    assert function
    env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "tmp": str(scratch)}
    made = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{function[0]}\nray_node --head"],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    if there in {"nothing", "our own folder"}:
        assert made.returncode == 0 and log.read_text(encoding="utf-8") == "700\n"
    else:
        assert made.returncode == 1 and "is not this user's; set MEA_RAY_TMP" in made.stderr
        assert not log.exists() and elsewhere.is_dir()


def test_nobody_can_guess_rays_folder() -> None:
    assert 'tmp=$(mktemp -d "${MEA_RAY_TMP:-/tmp}/mea-ray-XXXXXXXXXX")' in read("slurm.sh")


def test_hadolint_has_nothing_to_say() -> None:
    output = subprocess.run(
        [tool("hadolint"), "--no-color", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (output.returncode, output.stdout + output.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="apt-get install docker-compose runs this test")
def test_docker_compose_takes_the_file(tmp_path: Path) -> None:
    def check(file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["docker-compose", "-f", str(file), "config"]
        known = {name: value for name, value in os.environ.items() if name not in {"VICTIM", "VICTIMS"}}
        return subprocess.run(command, env={**known, **environment}, capture_output=True, text=True, check=False)

    file = CLUSTER / "docker-compose.yaml"
    taken = check(file, VICTIMS=str(tmp_path), VICTIM="shop")
    assert taken.returncode == 0, taken.stderr
    service = yaml.safe_load(taken.stdout)["services"]["victim"]
    assert service["command"][:3] == ["mea-ray", "serve", "/victims/shop"]
    assert [str(port).split(":")[0] for port in service["ports"]] == ["127.0.0.1"], "the owner decides who reaches it"
    missing = check(file, VICTIMS=str(tmp_path))
    assert missing.returncode and "the folder of the victim" in missing.stderr
    mistyped = tmp_path / "mistyped.yaml"
    mistyped.write_text(file.read_text(encoding="utf-8").replace("restart:", "restarts:"), encoding="utf-8")
    refused = check(mistyped, VICTIMS=str(tmp_path), VICTIM="shop")
    assert refused.returncode and "restarts" in refused.stderr


def test_the_image_is_built_from_what_exists_and_does_not_run_as_root() -> None:
    lines = re.sub(r"\\\n", " ", read("Dockerfile")).splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    copied = [word for line in instructions if line[0] == "COPY" for word in line[1:-1] if not word.startswith("--")]
    assert copied and all((ROOT / path).exists() for path in copied), copied
    assert {"pyproject.toml", "mea_ray", "sweeps"} <= set(copied)
    assert [line[1] for line in instructions if line[0] == "USER"][-1] == "1000"
    # Dependencies are a layer of their own, before the first file that changes every day.
    kinds = [" ".join(line) for line in instructions]
    assert min(i for i, line in enumerate(kinds) if "pip install" in line) < kinds.index(
        "COPY --chown=ray:users mea_ray mea_ray"
    )


def test_the_image_has_the_versions_of_the_lock_file_and_the_lock_file_what_we_need() -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    lines = [line for line in read("requirements.lock").splitlines() if not line.startswith("#")]
    locked = {name: version for name, _, version in (line.partition("==") for line in lines)}
    assert all(locked.values()) and len(locked) == len(lines)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]:
        needed = Requirement(text)
        assert needed.specifier.contains(locked[needed.name.lower()]), text
    assert f"ARG RAY_VERSION={locked['ray']}\n" in read("Dockerfile")
    assert "--constraint requirements.lock" in read("Dockerfile")


def test_all_files_take_one_version_of_ray() -> None:
    version = re.search(r"ARG RAY_VERSION=(\S+)", read("Dockerfile"))
    assert version
    for name in ("aws", "gcp", "ssh"):
        assert yaml.safe_load(read(f"{name}.yaml"))["docker"]["image"].startswith(f"rayproject/ray:{version[1]}-py3")
    assert list(yaml.safe_load_all(read("kuberay-cluster.yaml")))[-1]["spec"]["rayVersion"] == version[1]
    assert yaml.safe_load(read(JOB_FILE))["spec"]["rayClusterSpec"]["rayVersion"] == version[1]


NAMES = sorted({GUIDE, *(path.name for path in CLUSTER.iterdir())} - {"README.md", "requirements.lock"})
VARIABLES = {
    '"$sweep"': "sweeps/quickstart.yaml",
    '"$@"': "",
    '"$address"': "auto",
    "$storage": "/shared/results",
    "$wandb": "offline",
}


def commands(name: str) -> list[list[str]]:
    """Every `mea-ray` command in a file, as the words that the program would get."""
    text = re.sub(r"\\\n\s*", " ", read(name))
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    result = re.findall(r"mea-ray ((?:sweep|run|plan|report|calibrate|list|bench) [^\n`&|;]*)", text)
    if name == "Dockerfile":
        result += [" ".join(json.loads(line)[1:]) for line in re.findall(r"^CMD (.*)$", text, re.MULTILINE)]
    return [shlex.split(close_quotes(command), comments=True) for command in result]


def close_quotes(command: str) -> str:
    """Cut a command that stands in the quotes of another one (`ray exec FILE '...'`) at the closing quote."""
    return command[: command.rindex("'")] if command.count("'") % 2 else command


def test_the_files_do_call_the_program() -> None:
    assert {name for name in NAMES if commands(name)} >= {GUIDE, "slurm.sh", JOB_FILE, "Dockerfile"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_program_takes(name: str) -> None:
    group = typer.main.get_command(app)
    for words in commands(name):
        verb, *arguments = (word.replace("FILE", "sweeps/quickstart.yaml") for word in words)
        command = group.commands[verb]  # type: ignore[attr-defined]
        context = command.make_context(verb, [word.replace(IMAGE_HOME, f"{ROOT}/") for word in arguments])
        if verb in {"sweep", "plan"}:
            file = ROOT / context.params["file"]
            assert file.is_file(), words
            load_sweep(file, context.params["overrides"] or [])


def test_a_wrong_flag_would_be_detected() -> None:
    command = typer.main.get_command(app).commands["sweep"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("sweep", ["sweeps/quickstart.yaml", "--adress", "auto"])


def test_the_guide_names_every_file_and_only_files_that_exist() -> None:
    text = read(GUIDE)
    for name in NAMES:
        assert name == GUIDE or f"cluster/{name}" in text, name
    for path in re.findall(r"cluster/[\w.-]+\.(?:yaml|sh)", text):
        assert (ROOT / path).exists(), path
