"""The files of cluster/, held against the schemas and linters of the tools that read them, without a network."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kuberay_schema
import kubernetes_validate
import pytest
import typer
import yaml

from mea_ray.cli import app
from mea_ray.config import load_sweep

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
CLOUDS = ("aws", "gcp")
IMAGE_HOME = "/home/ray/mea_ray/"
Tree = dict[str, Any]


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def tool(name: str) -> str:
    """A program that pip installed beside this interpreter."""
    path = Path(sysconfig.get_path("scripts")) / name
    return str(path) if path.exists() else name


# --- ray up -----------------------------------------------------------------------------------------------------------


def launch(tree: Tree) -> Tree:
    """What `ray up` makes of a file before it talks to the cloud; it is validated on the way."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Tree = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> Tree:
    tree: Tree = yaml.safe_load(read(f"{request.param}.yaml"))
    return tree


def test_ray_up_takes_the_file(cloud: Tree) -> None:
    config = launch(cloud)
    assert config["head_node_type"] == "head"
    head, worker = (config["available_node_types"][name] for name in ("head", "spot_gpu"))
    assert "GPU" not in head["resources"] and worker["resources"]["GPU"] == 1
    assert (worker["min_workers"], worker["max_workers"]) == (0, config["max_workers"])
    # Ray's own defaults would install a development version of Ray.
    assert not any("ray-wheels" in command for command in config["worker_setup_commands"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minuts",), 5),
        (("max_workers",), "four"),
        (("available_node_types", "spot_gpu", "min_worker"), 0),
        (("available_node_types", "spot_gpu", "resources", "GPU"), -1),
        (("head_node_type",), "hed"),
        (("docker", "imagee"), "x"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_ray_up_refuses_a_mistake(cloud: Tree, path: tuple[str, ...], value: object) -> None:
    place = cloud
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        launch(cloud)


def test_workers_are_spot_machines() -> None:
    worker = {name: yaml.safe_load(read(f"{name}.yaml"))["available_node_types"]["spot_gpu"] for name in CLOUDS}
    assert worker["aws"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["gcp"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ([{"CPU": 1.0, "GPU": 0.5}] * 3, {"spot_gpu": 2}),
        ([{"CPU": 1.0, "GPU": 1.0}] * 9, {"spot_gpu": 4}),
        ([{"CPU": 1.0, "GPU": 2.0}], {}),
    ],
)
def test_gpus_that_trials_ask_for_bring_spot_machines(
    cloud: Tree, demand: list[dict[str, float]], expected: dict[str, int]
) -> None:
    """Ray's own bin packing, with the head already up: as many workers as are needed, never more than the limit."""
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    config = launch(cloud)

    def score(node: Any, wanted: Any, name: str) -> Any:
        return _default_utilization_scorer(node, wanted, name, node_availability_summary=None)

    added, _ = get_nodes_for(
        config["available_node_types"], {"head": 1}, "head", config["max_workers"], list(demand), score
    )
    assert dict(added) == expected


def test_what_is_copied_to_the_machines_exists(cloud: Tree) -> None:
    assert cloud["file_mounts"]["/home/ray/mea_ray"] == "."
    assert (ROOT / ".gitignore").exists() and cloud["rsync_filter"] == [".gitignore"]
    assert "pip install" in " ".join(cloud["setup_commands"])


def ray_start_commands() -> Iterator[tuple[str, list[str]]]:
    for name in CLOUDS:
        tree = yaml.safe_load(read(f"{name}.yaml"))
        for command in tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]:
            if "ray start" in command:
                yield name, shlex.split(command.partition("ray start")[2])


@pytest.mark.parametrize(("name", "arguments"), ray_start_commands())
def test_ray_start_knows_the_flags(name: str, arguments: list[str]) -> None:
    from ray.scripts.scripts import start

    start.make_context("start", list(arguments))


# --- KubeRay ----------------------------------------------------------------------------------------------------------


def manifests(name: str) -> list[Tree]:
    return [tree for tree in yaml.safe_load_all(read(name)) if tree]


def pod_templates(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in {"template", "submitterPodTemplate"}:
                yield value
            else:
                yield from pod_templates(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pod_templates(value)


def check_manifest(tree: Tree) -> None:
    """KubeRay's part against KubeRay's fields, pods and everything else against Kubernetes' own schemas."""
    version = kubernetes_validate.latest_version()
    if tree["kind"] not in kuberay_schema.SCHEMAS:
        kubernetes_validate.validate(tree, version, strict=True)
        return
    jsonschema.validate(tree, kuberay_schema.SCHEMAS[tree["kind"]])
    for template in pod_templates(tree["spec"]):
        assert template["spec"]["containers"][0]["image"]
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(whole, version, strict=True)


CLUSTER_FILE, JOB_FILE = "kuberay-cluster.yaml", "kuberay-job.yaml"


@pytest.mark.parametrize("name", [CLUSTER_FILE, JOB_FILE])
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for tree in manifests(name):
        check_manifest(tree)


def test_what_the_manifests_promise() -> None:
    claim, cluster = manifests(CLUSTER_FILE)
    (job,) = manifests(JOB_FILE)
    assert (claim["kind"], cluster["kind"], job["kind"]) == ("PersistentVolumeClaim", "RayCluster", "RayJob")
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert cluster["spec"]["enableInTreeAutoscaling"] and workers["minReplicas"] == 0
    assert job["spec"]["shutdownAfterJobFinishes"]
    for template in pod_templates([cluster, job]):
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in template["spec"]["volumes"]]
        assert claim["metadata"]["name"] in claims, "every pod sees the storage"
        assert template["spec"]["securityContext"]["runAsNonRoot"]


def test_rays_autoscaler_reads_the_cluster() -> None:
    """The code that runs in KubeRay's autoscaler container; it validates what it makes of the manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = manifests(CLUSTER_FILE)[1]
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    worker = config["available_node_types"]["gpu"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
    assert (worker["resources"]["CPU"], worker["resources"]["GPU"]) == (8, 1)
    assert config["idle_timeout_minutes"] == 5


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (CLUSTER_FILE, "minReplicas", "minReplica"),
        (CLUSTER_FILE, "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: 'yes please'"),
        (CLUSTER_FILE, "upscalingMode: Default", "upscalingMode: Fast"),
        (CLUSTER_FILE, "accessModes", "accesModes"),
        (CLUSTER_FILE, "imagePullPolicy", "imagePullPolice"),
        (CLUSTER_FILE, "volumeMounts", "volumeMount"),
        (CLUSTER_FILE, "runAsUser: 1000", "runAsUser: ray"),
        (JOB_FILE, "shutdownAfterJobFinishes", "shutDownAfterJobFinishes"),
        (JOB_FILE, "submissionMode: K8sJobMode", "submissionMode: Job"),
        (JOB_FILE, "persistentVolumeClaim", "persistentVolumeClaims"),
    ],
)
def test_a_mistyped_manifest_is_refused(name: str, old: str, new: str) -> None:
    text = read(name)
    assert old in text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        for tree in yaml.safe_load_all(text.replace(old, new)):
            check_manifest(tree)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say() -> None:
    said = subprocess.run(
        [tool("shellcheck"), "--enable=quote-safe-variables,require-variable-braces", "--exclude=SC2250"]
        + [str(CLUSTER / "slurm.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stdout) == (0, "")
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
def test_ray_is_told_what_slurm_gave(tmp_path: Path, given: dict[str, str], gpus: int, store: int | None) -> None:
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


# --- Docker -----------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    said = subprocess.run(
        [tool("hadolint"), "--no-color", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


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


def test_all_files_take_one_version_of_ray() -> None:
    version = re.search(r"ARG RAY_VERSION=(\S+)", read("Dockerfile"))
    assert version
    for name in CLOUDS:
        assert yaml.safe_load(read(f"{name}.yaml"))["docker"]["image"].startswith(f"rayproject/ray:{version[1]}-py3")
    assert manifests(CLUSTER_FILE)[1]["spec"]["rayVersion"] == version[1]
    assert manifests(JOB_FILE)[0]["spec"]["rayClusterSpec"]["rayVersion"] == version[1]


# --- mea-ray ----------------------------------------------------------------------------------------------------------

NAMES = sorted(path.name for path in CLUSTER.iterdir())
VARIABLES = {'"$sweep"': "sweeps/quickstart.yaml", '"$@"': "", '"$address"': "auto", "$storage": "/shared/results"}


def commands(name: str) -> list[list[str]]:
    """Every `mea-ray` command in a file, as the words that the program would get."""
    text = re.sub(r"\\\n\s*", " ", read(name))
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    found = re.findall(r"mea-ray ((?:sweep|run|plan|report|calibrate|list|bench) [^\n`&|;]*)", text)
    if name == "Dockerfile":
        found += [" ".join(json.loads(line)[1:]) for line in re.findall(r"^CMD (.*)$", text, re.MULTILINE)]
    return [shlex.split(close_quotes(command), comments=True) for command in found]


def close_quotes(command: str) -> str:
    """Cut a command that stands in the quotes of another one (`ray exec FILE '...'`) at the closing quote."""
    return command[: command.rindex("'")] if command.count("'") % 2 else command


def test_the_files_do_call_the_program() -> None:
    assert {name for name in NAMES if commands(name)} >= {"README.md", "slurm.sh", JOB_FILE, "Dockerfile"}


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


def test_a_wrong_flag_would_be_found() -> None:
    command = typer.main.get_command(app).commands["sweep"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("sweep", ["sweeps/quickstart.yaml", "--adress", "auto"])


def test_the_readme_names_every_file_and_only_files_that_exist() -> None:
    text = read("README.md")
    for name in NAMES:
        assert name == "README.md" or f"cluster/{name}" in text, name
    for path in re.findall(r"cluster/[\w.-]+\.(?:yaml|sh)", text):
        assert (ROOT / path).exists(), path
