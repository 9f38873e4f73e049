"""What lies in deploy/: manifests that KubeRay takes, without a secret, at the versions that the project is tested with.

The fields and types are those of the custom resource definitions of KubeRay 1.6.2 for ray.io/v1
(ray-operator/config/crd/bases), and the further rules those of its ray-operator/controllers/ray/utils/validation.go.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.config import check, resolve

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
QUANTITY = re.compile(r"([0-9]+|[0-9]*\.[0-9]+)([KMGTPE]i|[numkMGTPE])?")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
JOB_FIELDS = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "entrypoint": str,
    "rayClusterSpec": dict,
    "shutdownAfterJobFinishes": bool,
    "submissionMode": str,
    "ttlSecondsAfterFinished": int,
}
CLUSTER_FIELDS = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
HEAD_FIELDS = {"rayStartParams": dict, "template": dict}
WORKER_FIELDS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    **HEAD_FIELDS,
}
"""groupName, minReplicas, maxReplicas and template are required of workers, template of the head."""


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [(path.name, one) for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for _, one in documents() if one["kind"] == kind]


def clusters() -> list[dict[str, Any]]:
    return [one["spec"] for one in of_kind("RayCluster")] + [
        one["spec"]["rayClusterSpec"] for one in of_kind("RayJob")
    ]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def has(value: dict[str, Any], fields: dict[str, type]) -> None:
    """Just these fields, of these types."""
    assert set(value) == set(fields)
    for name, kind in fields.items():
        assert type(value[name]) is kind, name


def test_there_is_one_of_each_kind() -> None:
    kinds = sorted((one["apiVersion"], one["kind"]) for _, one in documents())
    assert kinds == [("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob"), ("v1", "ConfigMap")]
    for _, one in documents():
        # A service of the head adds its ending to a cluster's name, and both must fit into 63.
        assert NAME.fullmatch(one["metadata"]["name"]) and len(one["metadata"]["name"]) <= 47


def test_a_job_has_its_deadlines_and_leaves_nothing_running() -> None:
    [job] = of_kind("RayJob")
    has(job["spec"], JOB_FIELDS)
    spec = job["spec"]
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0
    # A time to live is refused where the cluster is not shut down.
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


@pytest.mark.parametrize("cluster", clusters())
def test_a_cluster_is_one_that_kuberay_takes(cluster: dict[str, Any]) -> None:
    has(cluster, CLUSTER_FIELDS)
    has(cluster["headGroupSpec"], HEAD_FIELDS)
    assert cluster["authOptions"] == {"mode": "token"}
    for worker in cluster["workerGroupSpecs"]:
        has(worker, WORKER_FIELDS)
        assert 0 <= worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(type(value) is str for value in group["rayStartParams"].values())
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["name"] and container["securityContext"]["allowPrivilegeEscalation"] is False
            limits = container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(limits) and limits == container["resources"]["requests"]
            assert all(QUANTITY.fullmatch(str(value)) for value in limits.values())


@pytest.mark.parametrize("cluster", clusters())
def test_gpus_are_the_workers_and_the_databases_url_is_the_heads(cluster: dict[str, Any]) -> None:
    head, *workers = pods(cluster)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [variable] = head["containers"][0]["env"]
    assert variable["name"] == "NAS_STORAGE_URL" and set(variable["valueFrom"]) == {"secretKeyRef"}
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "nas-database", "key": "url"}
    for worker in workers:
        assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert "env" not in worker["containers"][0]


@pytest.mark.parametrize("path", [*MANIFESTS, DEPLOY / "Dockerfile"], ids=lambda path: path.name)
def test_no_secret_stands_in_clear_text(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\w+://[^\s:/@]*:[^\s@]+@", text)
    assert not re.search(r"(?i)(auth_token|password|passwd)\s*[:=]\s*\S", text)
    assert "kind: Secret" not in text and "RAY_AUTH_TOKEN" not in text


def test_the_entry_point_is_a_command_of_ours_without_an_address() -> None:
    [job] = of_kind("RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["nas", "search"] and "://" not in job["spec"]["entrypoint"]
    assert words[words.index("--storage-env") + 1] == "NAS_STORAGE_URL"
    [head] = [pod for pod in pods(job["spec"]["rayClusterSpec"]) if "volumes" in pod]
    [volume], [mount] = head["volumes"], head["containers"][0]["volumeMounts"]
    [mapping] = of_kind("ConfigMap")
    assert volume["configMap"]["name"] == mapping["metadata"]["name"] and volume["name"] == mount["name"]
    [file] = mapping["data"]
    assert words[words.index("--config") + 1] == f"{mount['mountPath']}/{file}"


def test_the_search_of_the_job_is_valid_and_fills_the_cluster() -> None:
    [job], [mapping] = of_kind("RayJob"), of_kind("ConfigMap")
    config = resolve(yaml.safe_load(mapping["data"]["search.yaml"]))
    check(config)
    assert (config.pool, config.ray_address) == ("ray", "auto")
    assert (config.proxy.device, config.target.device) == ("cuda", "cuda")
    gpus = sum(
        group["replicas"]
        * group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    )
    assert config.workers == gpus


def test_versions_agree() -> None:
    docker = (DEPLOY / "Dockerfile").read_text()
    for cluster in clusters():
        assert cluster["rayVersion"] == PINNED["ray"]
        for pod in pods(cluster):
            assert {one["image"] for one in pod["containers"]} == {f"nas:{PROJECT['version']}"}
    assert f"-t nas:{PROJECT['version']}" in docker
    python = re.search(r"^FROM python:(\d+\.\d+)-slim", docker, re.MULTILINE)
    # The Python that mypy checks for, and that the pinned versions were resolved with.
    assert python and PROJECT["requires-python"] == f">={python.group(1)}"
    assert "-c constraints.txt '.[cluster]'" in docker
    assert any(name.startswith("ray[default]") for name in PROJECT["optional-dependencies"]["cluster"])


def test_the_image_holds_all_of_us() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = re.findall(r"^COPY (\w+) (\w+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {source for source, _ in copied} == set(settings["tool"]["importlinter"]["root_packages"])
    assert all(source == target for source, target in copied)
