"""Components of packages that are not installed are found by the workers, too: of our own Ray and of a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_sweep

from mea_ray.config import ExperimentConfig, build, write_yaml
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.data import Fingerprints
from mea_ray.experiment.names import trial_name
from mea_ray.results.records import read_results
from mea_ray.sweep.modules import modules_to_send

ROOT = Path(__file__).parents[2]
ATTACK = """
from my_parts.size import CHUNK
from mea_ray.attacks.query_attack import QueryAttack

class Mine(QueryAttack):
    '''Queries the pool in random order.'''

    def queries(self, thief):
        yield from thief.query_pool(CHUNK)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of the user's own, in a folder of its own."""
    folder = tmp_path / "work" / "my_parts"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "size.py").write_text("CHUNK = 16\n")
    (folder / "attacks.py").write_text(ATTACK)
    return folder


def test_what_is_not_installed_is_sent_unless_the_workers_find_it_anyway(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    tree = {"base": {"storage": "s3://a/b"}, "space": {"thief.attack.name": {"grid": ["my_parts.attacks:Mine"]}}}
    assert modules_to_send(tree, None, "head:6379") == modules_to_send(tree, None, None) == [str(package)]
    monkeypatch.chdir(package.parent)
    assert modules_to_send(tree, None, None) == []
    assert modules_to_send(tree, None, "head:6379") == [str(package)]
    sys.modules.pop("my_parts")


@pytest.mark.parametrize(
    "name", ["knockoff", "numpy.linalg:norm", "mea_ray.attacks.knockoff:Knockoff", "no_such:Thing"]
)
def test_what_is_installed_on_every_machine_is_not_sent(name: str) -> None:
    assert modules_to_send({"thief": {"attack": {"name": name}}}, None, "head:6379") == []


def test_what_is_given_is_sent_and_nothing_else(package: Path) -> None:
    tree = {"name": "my_parts.attacks:Mine"}
    given = [str(package), str(package / "size.py"), "s3://bucket/parts.zip"]
    assert modules_to_send(tree, given, None) == given
    assert modules_to_send(tree, [], "head:6379") == []
    for wrong in (package / "none", package.parent / "notes.txt"):
        (package.parent / "notes.txt").touch()
        with pytest.raises(ConfigError, match=f"resources.py_modules: '{wrong}' is neither"):
            modules_to_send(tree, [str(wrong)], None)


def test_where_the_packages_are_is_no_part_of_an_experiment() -> None:
    plain, sent = build(ExperimentConfig, {}), build(ExperimentConfig, {"resources": {"py_modules": ["/x"]}})
    assert trial_name(sent, Fingerprints("data")) == trial_name(plain, Fingerprints("data"))


@pytest.mark.slow
def test_a_ray_of_our_own_whatever_the_environment_says_with_an_attack_of_the_working_directory(
    package: Path, tmp_path: Path
) -> None:
    sweep = tiny_sweep(tmp_path / "storage")
    base = sweep.base.resolved()
    base["service"]["rate"] = None
    base["removal"]["methods"], base["detection"]["methods"] = [], []
    base["verification"]["stolen_null_models"] = 0
    write_yaml(build(ExperimentConfig, base), tmp_path / "one.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    short = Path(f"/tmp/mr{os.getpid()}")  # for Ray's sockets
    (short / "ray").mkdir(parents=True)
    (short / "ray" / "ray_current_cluster").write_text(dead)
    of_another_ray = {
        "RAY_ADDRESS": dead,
        "RAY_TMPDIR": str(short),
        "RAY_NAMESPACE": "theirs",
        "RAY_JOB_ID": "07000000",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"working_dir": "gcs://gone.zip"}, "metadata": {}}),
        "RAY_REDIS_ADDRESS": dead,
    }
    # As the installed command does it: the working directory is not on the path.
    command = "import sys; sys.path.remove(''); from mea_ray.cli.main import main; sys.exit(main(sys.argv[1:]))"
    try:
        made = subprocess.run(
            [sys.executable, "-c", command, "run", str(tmp_path / "one.yaml"), "thief.attack=my_parts.attacks:Mine"],
            cwd=package.parent,
            env={**os.environ, **of_another_ray, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1200,  # for what hangs
        )
    finally:
        shutil.rmtree(short)
    assert made.returncode == 0, made.stderr + made.stdout
    (result,) = read_results(tmp_path / "storage" / "one")
    assert result.config["thief"]["attack"]["name"] == "my_parts.attacks:Mine" and result.queries_charged == 96


ON_A_CLUSTER = """
import sys
from mea_ray.attacks import ATTACKS
from mea_ray.sweep import cluster
from mea_ray.sweep.modules import modules_to_send

address = sys.argv[1]
modules = modules_to_send({"name": "my_parts.attacks:Mine"}, None, address)
with cluster.quiet(), cluster.ray_cluster(address, modules) as ray:
    print(ray.get(ray.remote(lambda: ATTACKS.resolve("my_parts.attacks:Mine").__module__).remote()))
"""


def test_a_cluster_is_sent_what_its_machines_do_not_have(package: Path, tmp_path: Path, ray_session: None) -> None:
    import ray

    made = subprocess.run(
        [sys.executable, "-c", ON_A_CLUSTER, ray.get_runtime_context().gcs_address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{package.parent}"},
        capture_output=True,
        text=True,
        timeout=1200,  # for what hangs
    )
    assert made.stdout.split() == ["my_parts.attacks"], made.stderr
