"""What a RayCluster and a RayJob may hold, written after KubeRay's API reference (ray.io/v1, KubeRay 1.6).

Only fields that KubeRay itself defines; pod templates are left to Kubernetes' own schemas.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANYTHING: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
AUTHENTICATION: Schema = {"mode": {"enum": ["disabled", "token"]}, "secretName": TEXT, "enableK8sTokenAuth": FLAG}


def strict(fields: Schema, *required: str) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


AUTOSCALER = strict(
    {
        "resources": ANYTHING,
        "image": TEXT,
        "imagePullPolicy": TEXT,
        "securityContext": ANYTHING,
        "idleTimeoutSeconds": COUNT,
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
        "version": {"enum": ["v1", "v2"]},
        "env": {"type": "array"},
        "envFrom": {"type": "array"},
        "volumeMounts": {"type": "array"},
    }
)
GROUP: Schema = {"rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS, "template": ANYTHING}
HEAD = strict(
    GROUP
    | {
        "headService": ANYTHING,
        "enableIngress": FLAG,
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    },
    "template",
)
WORKERS = strict(
    GROUP
    | {
        "groupName": TEXT,
        "suspend": FLAG,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "idleTimeoutSeconds": COUNT,
        "numOfHosts": COUNT,
        "scaleStrategy": ANYTHING,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
)
CLUSTER_SPEC = strict(
    {
        "suspend": FLAG,
        "managedBy": TEXT,
        "authOptions": strict(AUTHENTICATION),
        "autoscalerOptions": AUTOSCALER,
        "enableInTreeAutoscaling": FLAG,
        "gcsFaultToleranceOptions": strict(
            {
                "externalStorageNamespace": TEXT,
                "redisAddress": TEXT,
                "redisUsername": ANYTHING,
                "redisPassword": ANYTHING,
            },
            "redisAddress",
        ),
        "headGroupSpec": HEAD,
        "headServiceAnnotations": TEXTS,
        "rayVersion": TEXT,
        "upgradeStrategy": ANYTHING,
        "workerGroupSpecs": {"type": "array", "items": WORKERS},
    },
    "headGroupSpec",
)
JOB_SPEC = strict(
    {
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "backoffLimit": COUNT,
        "clusterSelector": TEXTS,
        "deletionStrategy": ANYTHING,
        "entrypoint": TEXT,
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "entrypointResources": TEXT,
        "jobId": TEXT,
        "managedBy": TEXT,
        "metadata": TEXTS,
        "preRunningDeadlineSeconds": {"type": "integer", "minimum": 1},
        "rayClusterSpec": CLUSTER_SPEC,
        "runtimeEnvYAML": TEXT,
        "shutdownAfterJobFinishes": FLAG,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterConfig": ANYTHING,
        "submitterPodTemplate": ANYTHING,
        "suspend": FLAG,
        "ttlSecondsAfterFinished": COUNT,
    },
    "rayClusterSpec",
    "entrypoint",
)

SERVICE_SPEC = strict(
    {
        "serveConfigV2": TEXT,
        "rayClusterConfig": CLUSTER_SPEC,
        "serviceUnhealthySecondThreshold": COUNT,
        "deploymentUnhealthySecondThreshold": COUNT,
        "rayClusterDeletionDelaySeconds": COUNT,
        "excludeHeadPodFromServeSvc": FLAG,
        "serveService": ANYTHING,
        "upgradeStrategy": ANYTHING,
        "suspend": FLAG,
    },
    "serveConfigV2",
    "rayClusterConfig",
)


def resource(kind: str, spec: Schema) -> Schema:
    """A Kubernetes resource of KubeRay's group."""
    fields = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": ANYTHING, "spec": spec}
    return strict(fields, "apiVersion", "kind", "metadata", "spec")


SCHEMAS = {
    "RayCluster": resource("RayCluster", CLUSTER_SPEC),
    "RayJob": resource("RayJob", JOB_SPEC),
    "RayService": resource("RayService", SERVICE_SPEC),
}
