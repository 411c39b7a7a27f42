"""The Kubernetes recipes: what they name exists, and their commands are Tinsmith's.

Fields are checked against the names that KubeRay's definitions (v1) and Kubernetes' have; the whole of
KubeRay's schemas was applied once, by hand (`deploy/README.md`).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.actors.script import ROOT
from tests.deploy.commands import parsed
from tinsmith.gateway.server import DRAIN_S, STOPPING_S

FOLDER = ROOT / "deploy" / "kuberay"
RAY = "2.60.0"
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
HEAD = {"rayStartParams", "template"}
GROUP = {*HEAD, "groupName", "replicas", "minReplicas", "maxReplicas"}
POD = {"containers", "volumes", "tolerations", "terminationGracePeriodSeconds"}
PROBES = {"startupProbe", "readinessProbe", "livenessProbe"}
CONTAINER = {
    *("name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"),
    *PROBES,
}
PROBE = {"httpGet", "periodSeconds", "failureThreshold", "timeoutSeconds"}


def documents() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [(f.name, d) for f in files for d in yaml.safe_load_all(f.read_text())]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for _, document in documents() if document["kind"] == kind]


def clusters() -> list[dict[str, Any]]:
    of_jobs = [job["spec"]["rayClusterSpec"] for job in of_kind("RayJob")]
    return [*(cluster["spec"] for cluster in of_kind("RayCluster")), *of_jobs]


def pods() -> list[dict[str, Any]]:
    groups = [g for c in clusters() for g in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    templates = [group["template"] for group in groups]
    templates += [deployment["spec"]["template"] for deployment in of_kind("Deployment")]
    return [template["spec"] for template in templates]


def test_the_documents_are_of_known_kinds_and_versions():
    kinds = {(d["apiVersion"], d["kind"]) for _, d in documents()}
    assert kinds == {
        ("v1", "PersistentVolumeClaim"),
        ("v1", "Service"),
        ("apps/v1", "Deployment"),
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    }


def test_fields_are_those_of_kuberay_and_kubernetes():
    for cluster in clusters():
        assert set(cluster) == CLUSTER
        assert cluster["rayVersion"] == RAY
        assert set(cluster["headGroupSpec"]) == HEAD
        for group in cluster["workerGroupSpecs"]:
            assert set(group) == GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for job in of_kind("RayJob"):
        assert set(job["spec"]) == JOB
    for pod in pods():
        assert set(pod) <= POD
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            for probe in PROBES & set(container):
                assert set(container[probe]) <= PROBE


def test_the_image_holds_the_ray_that_the_clusters_name():
    assert f"rayproject/ray:{RAY}-py311" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert RAY.split(".")[0] == ray.__version__.split(".")[0]


def test_every_pod_mounts_volumes_that_there_are_and_sees_the_one_home():
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    for claim in of_kind("PersistentVolumeClaim"):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["home"]["persistentVolumeClaim"]["claimName"] in claims
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) <= set(volumes)
            assert {"name": "TINSMITH_HOME", "value": mounts["home"]} in container["env"]


def test_the_gateway_is_found_probed_scraped_and_given_time_to_drain():
    (service,), (deployment,), (cluster,) = map(of_kind, ("Service", "Deployment", "RayCluster"))
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    pod = template["spec"]
    assert pod["terminationGracePeriodSeconds"] >= DRAIN_S + STOPPING_S
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in PROBES:
        assert container[probe]["httpGet"] == {"path": "/api/v1/healthz", "port": "http"}
    scraped = template["metadata"]["annotations"]
    assert scraped["prometheus.io/path"] == "/metrics"

    name, options = parsed(container["command"] + container["args"])
    assert name == "serve"
    assert options["port"] == ports["http"] == int(scraped["prometheus.io/port"])
    assert options["host"] == "0.0.0.0"
    head = f"{cluster['metadata']['name']}-head-svc"  # what KubeRay calls it
    client = next(
        port["containerPort"]
        for port in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
        if port["name"] == "client"
    )
    assert options["address"] == f"ray://{head}:{client}"
    mounted = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert options["api_key_file"].parent == mounted["keys"]


def test_the_job_is_a_training_run():
    (job,) = of_kind("RayJob")
    name, options = parsed(shlex.split(job["spec"]["entrypoint"]))
    assert (name, options["address"]) == ("train", "auto")


@pytest.mark.parametrize("wrong", [["serve", "--adress=auto"], ["sevre"], ["serve", "--port=x"]])
def test_a_command_that_tinsmith_does_not_take_would_be_noticed(wrong):
    with pytest.raises(Exception, match=r"No such (option|command)|valid integer"):
        parsed(["tinsmith", *wrong])
