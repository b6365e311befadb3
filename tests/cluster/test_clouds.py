"""The files for `ray up`, held against Ray's own launcher, schema and bin packing, without a cloud."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click import ClickException

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ("aws", "gcp")
GUIDE = ROOT / "docs" / "cluster.md"
Tree = dict[str, Any]


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


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
    cloud: Tree, demand: list[dict[str, Any]], expected: dict[str, int]
) -> None:
    """Ray's own bin packing, with the head already up: as many workers as are needed, never more than the limit."""
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    config = launch(cloud)

    def score(node: Any, wanted: Any, name: str) -> Any:
        return _default_utilization_scorer(node, wanted, name, node_availability_summary=None)  # type: ignore[arg-type]

    added, _ = get_nodes_for(
        config["available_node_types"], {"head": 1}, "head", config["max_workers"], list(demand), score
    )
    assert dict(added) == expected


def test_what_is_copied_to_the_machines_exists(cloud: Tree) -> None:
    assert cloud["file_mounts"]["/home/ray/mea_ray"] == "."
    assert (ROOT / ".gitignore").exists() and cloud["rsync_filter"] == [".gitignore"]
    assert "pip install" in " ".join(cloud["setup_commands"])


def test_ray_up_takes_machines_that_are_reached_by_ssh() -> None:
    tree: Tree = yaml.safe_load(read("ssh.yaml"))
    config = launch(tree)
    assert config["provider"]["type"] == "local"
    (machines,) = config["available_node_types"].values()
    count = len(tree["provider"]["worker_ips"])
    assert (machines["min_workers"], machines["max_workers"], config["max_workers"]) == (count, count, count)
    (start,) = [command for command in tree["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start, "no trial beside the driver"
    del tree["provider"]["worker_ips"]
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, ClickException)):
        launch(tree)


def ray_start_commands() -> Iterator[tuple[str, list[str]]]:
    for name in (*CLOUDS, "ssh"):
        tree = yaml.safe_load(read(f"{name}.yaml"))
        for command in tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]:
            if "ray start" in command:
                yield name, shlex.split(command.partition("ray start")[2])


@pytest.mark.parametrize(("name", "arguments"), ray_start_commands())
def test_ray_start_knows_the_flags(name: str, arguments: list[str]) -> None:
    from ray.scripts.scripts import start

    start.make_context("start", list(arguments))


def test_workers_have_no_rights_but_those_of_the_bucket() -> None:
    aws, gcp = (yaml.safe_load(read(f"{name}.yaml"))["available_node_types"] for name in ("aws", "gcp"))
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in aws.items()}
    assert profiles == {"head": "mea-ray-head", "spot_gpu": "mea-ray-worker"}
    (account,) = gcp["spot_gpu"]["node_config"]["serviceAccounts"]
    assert account["email"].startswith("mea-ray-worker@")
    assert account["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]
    guide = re.sub(r"\s*\\\n\s*", " ", GUIDE.read_text(encoding="utf-8"))
    assert "--role-name mea-ray-head --policy-arn arn:aws:iam::aws:policy/AmazonEC2FullAccess" in guide
    assert "s3:*" not in guide and "--role roles/storage.objectAdmin --member serviceAccount:mea-ray-worker@" in guide
    for document in re.findall(r"--(?:assume-role-)?policy-document '(.*?\]\})'", guide, re.DOTALL):
        statements = json.loads(document.replace("'$BUCKET'", "b").replace("'$ACCOUNT'", "1"))["Statement"]
        assert all(statement["Effect"] == "Allow" and "*" not in statement["Action"] for statement in statements)
