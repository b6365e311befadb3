"""The KubeRay manifests, held against Kubernetes' schemas, KubeRay's fields and Ray's autoscaler, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kuberay_schema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
Tree = dict[str, Any]


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


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


CLUSTER_FILE, JOB_FILE, SERVICE_FILE = "kuberay-cluster.yaml", "kuberay-job.yaml", "kuberay-service.yaml"


@pytest.mark.parametrize("name", [CLUSTER_FILE, JOB_FILE, SERVICE_FILE])
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for tree in manifests(name):
        check_manifest(tree)


def test_what_the_manifests_promise() -> None:
    claim, redis, store, cluster = manifests(CLUSTER_FILE)
    (job,) = manifests(JOB_FILE)
    assert "activeDeadlineSeconds" not in job["spec"], "no sweep is ended by the clock"
    for spec in (cluster["spec"], job["spec"]["rayClusterSpec"]):
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no trial beside the driver"
    survives = cluster["spec"]["gcsFaultToleranceOptions"]
    assert survives["redisAddress"] == f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    (asks,) = [each for each in store["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert survives["redisPassword"]["valueFrom"] == asks["valueFrom"], "both read one secret"
    assert store["spec"]["volumeClaimTemplates"] and redis["spec"]["selector"] == {"app": store["metadata"]["name"]}
    assert (claim["kind"], cluster["kind"], job["kind"]) == ("PersistentVolumeClaim", "RayCluster", "RayJob")
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert cluster["spec"]["enableInTreeAutoscaling"] and workers["minReplicas"] == 0
    assert job["spec"]["shutdownAfterJobFinishes"]
    for template in pod_templates([cluster, job]):
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in template["spec"]["volumes"]]
        assert claim["metadata"]["name"] in claims, "every pod sees the storage"
        assert template["spec"]["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", [CLUSTER_FILE, JOB_FILE, SERVICE_FILE])
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    templates = list(pod_templates(manifests(name)))
    assert templates
    for template in templates:
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            rights = container["securityContext"]
            assert rights["capabilities"] == {"drop": ["ALL"]} and rights["allowPrivilegeEscalation"] is False


def test_the_service_of_the_manifest_can_be_built() -> None:
    """By Ray Serve's own schema of the config, and by the function that it names."""
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    (service,) = manifests(SERVICE_FILE)
    claim, *_ = manifests(CLUSTER_FILE)
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert import_attr(application.import_path)(application.args) is not None
    for template in pod_templates(service):
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in template["spec"]["volumes"]]
        assert claim["metadata"]["name"] in claims, "every pod sees the victim and the ledger"


def test_rays_autoscaler_reads_the_cluster() -> None:
    """The code that runs in KubeRay's autoscaler container; it validates what it makes of the manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = manifests(CLUSTER_FILE)[-1]
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
        (CLUSTER_FILE, "redisAddress", "redisAdress"),
        (CLUSTER_FILE, "accessModes", "accesModes"),
        (CLUSTER_FILE, "imagePullPolicy", "imagePullPolice"),
        (CLUSTER_FILE, "volumeMounts", "volumeMount"),
        (CLUSTER_FILE, "runAsUser: 1000", "runAsUser: ray"),
        (SERVICE_FILE, "rayClusterConfig", "rayClusterSpec"),
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


def test_only_ray_the_operator_and_customers_reach_the_pods() -> None:
    policy, _ = manifests("kuberay-network.yaml")
    check_manifest(policy)
    spec = policy["spec"]
    ray = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["podSelector"] == ray and spec["policyTypes"] == ["Ingress", "Egress"]
    inside, *others = spec["ingress"]
    assert inside == {"from": [{"podSelector": ray}]}
    assert all(rule["from"] and {port["port"] for port in rule["ports"]} <= {8000, 8265, 52365} for rule in others)
    named = {tuple(each["podSelector"]["matchLabels"].items()) for rule in others for each in rule["from"]}
    (job,) = manifests(JOB_FILE)
    assert (("job-name", job["metadata"]["name"]),) in named, "the pod that submits the job"
    (anywhere,) = [block["ipBlock"] for rule in spec["egress"] for block in rule["to"] if "ipBlock" in block]
    assert anywhere["except"] == ["169.254.0.0/16"], "where a machine's credentials are read"


def test_only_ray_reaches_its_control_data() -> None:
    policy, redis = manifests("kuberay-network.yaml")
    check_manifest(redis)
    _, service, *_ = manifests(CLUSTER_FILE)
    pods = redis["spec"]["podSelector"]
    assert pods == {"matchLabels": service["spec"]["selector"]}
    assert {"to": [{"podSelector": pods}], "ports": [{"port": 6379}]} in policy["spec"]["egress"]
    assert redis["spec"]["ingress"][0]["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert redis["spec"]["policyTypes"] == ["Ingress", "Egress"] and "egress" not in redis["spec"], "it calls nobody"


def test_the_network_policy_is_not_without_effect() -> None:
    policy, _ = manifests("kuberay-network.yaml")
    policy["spec"]["podSelectors"] = policy["spec"].pop("podSelector")
    with pytest.raises(Exception, match="podSelector"):
        check_manifest(policy)
