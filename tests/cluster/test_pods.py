"""Pods of jobs fit their machines, have a pool and a queue, and their logs survive them."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.allocatable import DAEMONS, HEAD_SIDECARS, allocatable, oversized_pods
from cluster.render import HERE, rendered
from pipelines.cli.config import load
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.steps import fetchers_of
from pipelines.precompute.config import PrecomputeConfig
from pipelines.recaption.config import RecaptionConfig
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.training.config import Stage1Config, Stage2Config
from tests.cluster.test_rendered import FILES, RAY, SIZES, pods


@pytest.mark.parametrize(("job", "config"), [("stage1", Stage1Config), ("stage2", Stage2Config)])
def test_training_fits_its_group(job: str, config: type) -> None:
    path = str(HERE.parent / "jobs/configs/full" / f"{job}.yaml")
    given = ["data.input=/a", "run_dir=/b", *(["data.captions=/c"] if job == "stage2" else [])]
    train = load(config, path, given).train
    group = SIZES["groups"][SIZES["jobs"][job]["models"]]
    for cpus in (group["cpus"], group["pod"]["cpus"]):
        a_node = min(group["gpus"], cpus // train.cpus_per_worker)
        assert group["min"] <= -(-train.num_workers // a_node) <= group["max"]


def test_recaption_fits_its_group() -> None:
    requested = yaml.safe_load((HERE.parent / "jobs/configs/full/recaption.yaml").read_text())
    group = SIZES["groups"][SIZES["jobs"]["recaption"]["models"]]
    assert (
        group["min"] * group["gpus"]
        <= requested["actors"]["num_actors"]
        <= group["max"] * group["gpus"]
    )


GIVEN = {
    "ingest": IngestConfig, "precompute": PrecomputeConfig, "stage1": Stage1Config,
    "stage2": Stage2Config, "recaption": RecaptionConfig, "reconstruct": ReconstructConfig,
}  # fmt: skip


@pytest.mark.parametrize("job", SIZES["jobs"])
def test_each_jobs_command_is_valid(job: str) -> None:
    """The shipped recipe and the settings of sizes.yaml, as the shell in the container splits them."""
    spec = FILES[f"kuberay/rayjob-{job}.yaml"][0]["spec"]
    python, script, flag, recipe, *settings = shlex.split(spec["entrypoint"])
    assert (python, flag) == ("python", "--config")
    ours = [HERE.parent / path.removeprefix("/home/ray/vlv/") for path in (script, recipe)]
    assert [path.stem for path in ours] == [job, job]
    assert ours[0].is_file()
    loaded = load(GIVEN[job], str(ours[1]), settings)
    assert loaded.ray.group == SIZES["jobs"][job]["models"]


def test_each_jobs_output_is_the_next_jobs_input() -> None:
    settings = {name: job["settings"] for name, job in SIZES["jobs"].items()}

    def place(job: str, setting: str) -> str:
        (value,) = (s.split("=", 1)[1] for s in settings[job] if s.startswith(f"{setting}="))
        return value

    images = place("ingest", "data.output")
    for job in ("precompute", "stage1", "stage2", "recaption", "reconstruct"):
        assert place(job, "data.input") == images
    assert place("stage1", "data.latents") == place("precompute", "data.output")
    assert place("stage2", "model.path") == place("stage1", "run_dir")
    assert place("recaption", "model.path") == place("stage2", "run_dir")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("name", ["head", *SIZES["groups"]])
def test_pods_fit_what_their_machine_leaves(cloud: str, name: str) -> None:
    size = SIZES["head"] if name == "head" else SIZES["groups"][name]
    available = allocatable(cloud, SIZES["machines"][size[cloud]], size["disk"])
    spec = next(
        pod["spec"]
        for path, pod in pods().items()
        if path == f"kuberay/raycluster.yaml:{name.replace('_', '-')}"
    )
    requested = Counter()
    for container in [*spec["containers"], *spec["initContainers"]]:
        for resource, value in container["resources"]["requests"].items():
            requested[resource] += amount(value)
    others = Counter(DAEMONS)
    if name == "head":
        others.update(HEAD_SIDECARS)
    assert requested["cpu"] + others["cpus"] <= available.cpus
    assert requested["memory"] + others["memory"] <= available.memory
    assert requested["ephemeral-storage"] <= available.disk
    volumes = {v["name"]: v.get("emptyDir", {}).get("sizeLimit") for v in spec["volumes"]}
    assert amount(volumes["scratch"]) <= requested["ephemeral-storage"]


def test_a_pod_that_would_stay_pending_is_an_error() -> None:
    assert oversized_pods(SIZES) == []
    sizes = copy.deepcopy(SIZES)
    sizes["groups"]["cpu"]["pod"]["cpus"] = 32
    (line,) = oversized_pods(sizes)
    assert line.startswith("cpu: pod.cpus=32, but c7i.8xlarge leaves 31.1")
    sizes["head"]["pod"]["disk"] = 150
    assert oversized_pods(sizes)[0].startswith(
        "head: pod.disk=150, but n2-standard-8 leaves 104.0 GiB of disk"
    )


@pytest.mark.parametrize(
    ("cloud", "machine", "disk", "cpus", "memory", "storage"),
    [
        # docs of GKE, "Plan node sizes": 4 CPUs leave 3.92; of 13 GB 2.6 are kept, and 100 MiB.
        ("gcp", {"cpus": 4, "memory": 13 / 0.975}, 100, 3.92, 13 - 2.3 - 100 / 1024, 49),
        ("gcp", {"cpus": 1, "memory": 4 / 0.975}, 500, 0.94, 3 - 100 / 1024, 350),
        # Amazon's script: 255 MiB and 11 for each of 29 pods, on a machine of 2 CPUs.
        (
            "aws",
            {"cpus": 2, "memory": 8 / 0.925, "pods": 29},
            20,
            1.93,
            8 - 574 / 1024 - 100 / 1024,
            17,
        ),
    ],
)
def test_the_formulas_are_the_providers(
    cloud: str, machine: dict[str, Any], disk: float, cpus: float, memory: float, storage: float
) -> None:
    available = allocatable(cloud, machine, disk)
    assert (available.cpus, available.memory, available.disk) == pytest.approx(
        (cpus, memory, storage)
    )


def test_head_and_submitter_stay_off_spot_and_workers_go_to_their_pool() -> None:
    for path, pod in pods().items():
        spec, group = pod["spec"], path.rpartition(":")[2]
        if group in ("head", "submitter"):
            assert spec["nodeSelector"] == {"vlv-group": "head"}
            assert "tolerations" not in spec
            affinity = spec["affinity"]["nodeAffinity"]
            (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"][
                "nodeSelectorTerms"
            ]
            assert {rule["operator"] for rule in term["matchExpressions"]} == {"NotIn"}
            assert "cloud.google.com/gke-spot" in {r["key"] for r in term["matchExpressions"]}
        else:
            assert spec["nodeSelector"] == {"vlv-group": group.replace("-", "_")}
        assert pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


def test_pools_are_labelled_and_tainted_as_pods_expect() -> None:
    (eks,) = FILES["pools/eksctl.yaml"]
    gke = rendered(SIZES)["pools/gke.sh"]
    pools = {pool["name"]: pool for pool in eks["managedNodeGroups"] if pool["name"] != "system"}
    falls_back = [name for name, group in SIZES["groups"].items() if group["on_demand"]]
    assert len(pools) == len(SIZES["groups"]) + 1 + len(falls_back)
    for path, pod in pods().items():
        group = path.rpartition(":")[2]
        if not path.startswith("kuberay/raycluster.yaml"):
            continue
        pool, spec = pools[f"vlv-{group}"], pod["spec"]
        assert pool["labels"] == spec["nodeSelector"]
        tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
        assert {taint["key"] for taint in pool.get("taints", [])} == tolerated
        template = "k8s.io/cluster-autoscaler/node-template"
        (label,) = spec["nodeSelector"].values()
        assert pool["tags"][f"{template}/label/vlv-group"] == label
        left = amount(pool["tags"][f"{template}/resources/ephemeral-storage"])
        assert amount(spec["containers"][0]["resources"]["requests"]["ephemeral-storage"]) <= left
        assert f"--node-labels=vlv-group={label}" in gke
    spot = [name for name, group in SIZES["groups"].items() if group["spot"]]
    assert gke.count("--node-taints=vlv-spot=true:NoSchedule") == len(spot)


def test_a_spot_group_has_an_on_demand_pool_of_lower_priority() -> None:
    (eks,) = FILES["pools/eksctl.yaml"]
    pools = {pool["name"]: pool for pool in eks["managedNodeGroups"]}
    first, second = pools["vlv-gpu-spot"], pools["vlv-gpu-spot-on-demand"]
    assert (first["spot"], second["spot"]) == (True, False)
    assert first["labels"] == second["labels"]
    assert {taint["key"] for taint in second["taints"]} == {"nvidia.com/gpu"}
    assert second["minSize"] == 0 < second["maxSize"]

    (values,) = FILES["pools/autoscaler-values.yaml"]
    assert values["extraArgs"]["expander"].startswith("priority")
    priorities = yaml.safe_load(values["expanderPriorities"])

    def priority(pool: str) -> int:
        """The highest priority whose pattern matches EKS' name of the pool's machines."""
        name = f"eks-{pool}-4ec1b2a3-1f0c-4b7e-9d3a-0123456789ab"
        return max(
            rank for rank, found in priorities.items() if any(re.search(p, name) for p in found)
        )

    assert priority(first["name"]) > priority(second["name"])
    assert {priority(name) for name in pools if name != first["name"]} == {priority("system")}


def test_a_group_that_waits_for_spot_has_one_pool() -> None:
    groups = {**SIZES["groups"], "gpu_spot": {**SIZES["groups"]["gpu_spot"], "on_demand": 0}}
    texts = rendered({**SIZES, "groups": groups})
    assert "on-demand" not in texts["pools/eksctl.yaml"] + texts["pools/gke.sh"]


def test_the_scripts_are_shell(tmp_path: Path) -> None:
    scripts = {path: text for path, text in rendered(SIZES).items() if path.endswith(".sh")}
    assert len(scripts) == 3
    for script in scripts.values():
        ended = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
    for pod in pods().values():
        for container in pod["spec"].get("initContainers", []):
            *_, text = container["command"]
            ended = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert (ended.returncode, ended.stderr) == (0, "")


def test_the_log_sidecar_mounts_rays_log_folder() -> None:
    """On heads KubeRay mounts a volume of its own at /tmp/ray, unless something is mounted there."""
    for path, pod in pods().items():
        if path.endswith(":submitter"):
            continue
        containers = [*pod["spec"]["containers"], *pod["spec"]["initContainers"]]
        where = "/tmp/ray" if path.endswith(":head") else "/tmp"
        volumes = {
            mount["name"]
            for container in containers
            for mount in container["volumeMounts"]
            if mount["mountPath"] == where
        }
        assert len(volumes) == 1, path
        mounted = [m["mountPath"] for c in containers for m in c["volumeMounts"]]
        assert mounted.count(where) == len(containers), path
        sizes = [amount(v["emptyDir"]["sizeLimit"]) for v in pod["spec"]["volumes"]
                 if v["name"] in ("scratch", "ray-logs")]  # fmt: skip
        requested = pod["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"]
        assert sum(sizes) <= amount(requested)


def test_logs_survive_their_pod(tmp_path: Path) -> None:
    """Runs the sidecar's script on local folders instead of its mounts."""
    (sidecar,) = next(iter(pods().values()))["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    *_, text = sidecar["command"]
    logs, kept = tmp_path / "session/logs", tmp_path / "kept"
    logs.mkdir(parents=True)
    (logs / "worker.out").write_text("first\n")
    if shutil.which("rsync") is None:  # as in the image
        text = text.replace("rsync -a", "cp -r").replace("logs/", "logs/.")
    text = text.replace("/tmp/ray/session_latest", str(tmp_path / "session"))
    process = subprocess.Popen(["bash", "-c", text], env={**os.environ, "KEPT": str(kept)})
    deadline = time.monotonic() + 60
    while not (kept / "worker.out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (logs / "worker.out").write_text("first\nlast\n")
    process.terminate()
    assert process.wait(30) == 0
    assert (kept / "worker.out").read_text() == "first\nlast\n"


def test_an_ingest_fits_its_group() -> None:
    """A fetcher and the step that reads its plan fit a node of the group."""
    group = SIZES["groups"]["cpu"]
    for cpus in (group["cpus"], group["pod"]["cpus"]):
        for nodes in (1, group["max"]):
            fetchers, decoders = fetchers_of([0, *[cpus] * nodes])
            assert fetchers * decoders <= nodes * cpus
            assert decoders <= cpus
        assert fetchers_of([0])[1] <= cpus  # what the autoscaler is requested for first
    assert SIZES["jobs"]["ingest"]["groups"] == ["cpu"]


def test_shared_memory_holds_the_object_store_and_fits_the_memory() -> None:
    for path, pod in pods().items():
        if path.endswith(":submitter"):
            continue
        (shm,) = (v["emptyDir"] for v in pod["spec"]["volumes"] if v["name"] == "shm")
        (container,) = pod["spec"]["containers"]
        # Data in /dev/shm counts as memory of the container.
        available = amount(container["resources"]["limits"]["memory"]) / 3
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        store = next(
            s
            for s in [SIZES["head"], *SIZES["groups"].values()]
            if s["pod"]["cpus"] == amount(container["resources"]["limits"]["cpu"])
        )
        assert store["object_store"] + gpus <= amount(shm["sizeLimit"]) <= available  # NCCL's, too


def amount(quantity: object) -> float:
    """A quantity in cores or GiB."""
    text = str(quantity)
    for unit, size in (("m", 1000), ("Mi", 1024), ("Gi", 1), ("", 1)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) / size
    raise AssertionError


def test_the_queue_has_room_for_each_job_and_all_groups() -> None:
    objects = FILES["kuberay/kueue-queues.yaml"]
    (queue,) = [o for o in objects if o["kind"] == "ClusterQueue"]
    (group,) = queue["spec"]["resourceGroups"]
    flavors = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ResourceFlavor"}
    assert [flavor["name"] for flavor in group["flavors"]] == list(flavors)
    quota = {
        flavor["name"]: {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assert [r["name"] for f in group["flavors"] for r in f["resources"]] == group[
        "coveredResources"
    ] * len(flavors)
    for path, document in RAY.items():
        if not path.startswith("kuberay/kueue-"):
            continue
        for workers in document["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            spec = workers["template"]["spec"]
            requested: Counter[str] = Counter()
            for container in [*spec["containers"], *spec["initContainers"]]:
                for name, value in container["resources"]["requests"].items():
                    requested[name] += workers["replicas"] * amount(value)
            assert requested.keys() <= set(group["coveredResources"])
            name = f"vlv-{workers['groupName']}"
            assert flavors[name]["spec"]["nodeLabels"] == spec["nodeSelector"]
            assert all(value <= quota[name][key] + 1e-9 for key, value in requested.items()), path
