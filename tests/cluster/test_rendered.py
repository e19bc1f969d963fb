"""Rendered files match the schemas of Ray's launcher, KubeRay and Kubernetes."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.render import read_sizes, rendered, stale

SIZES = read_sizes()
FILES = {
    path: list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    for path, text in rendered(SIZES).items()
    if path.endswith((".yaml", ".json"))
}
RAY = {p: d[0] for p, d in FILES.items() if d[0].get("kind") in ("RayCluster", "RayJob")}


def test_committed_files_are_up_to_date() -> None:
    assert stale(SIZES) == []


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_accepts_the_launcher_files(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(FILES[f"launcher/{cloud}.yaml"][0]))
    validate_config(config)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "0.0.0.0" not in str(config)


def test_aws_accepts_the_machines() -> None:
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    model = botocore.get_session().get_service_model("ec2").operation_model("RunInstances")
    for node in FILES["launcher/aws.yaml"][0]["available_node_types"].values():
        node_config = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        node_config["SubnetId"], *_ = node_config.pop("SubnetIds")  # Ray takes one of its list
        report = ParamValidator().validate(node_config, model.input_shape)
        assert not report.has_errors(), report.generate_report()


def strict(schema: Any) -> Any:
    """The schema with unknown fields rejected."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    closed = "properties" in schema and isinstance(schema["properties"], dict)
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def read_yaml(file: Path) -> Any:
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def our_schemas() -> dict[str, Any]:
    """By kind, a strict schema of the fields that we write."""
    schemas = strict(read_yaml(Path(__file__).with_name("kuberay_fields.yaml")))
    shared = {"$defs": schemas.pop("$defs")}
    return {kind: {**schema, **shared} for kind, schema in schemas.items()}


def kuberay_schemas(folder: Path) -> dict[str, Any]:
    """By kind, the strict schema in KubeRay's CRD."""
    schemas = {}
    for file in sorted(folder.glob("*.yaml")):
        crd = read_yaml(file)
        (version,) = (v for v in crd["spec"]["versions"] if v["storage"])
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[crd["spec"]["names"]["kind"]] = schema
    return schemas


@pytest.fixture(scope="module", params=["ours", "kuberay"])
def validators(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "ours":
        schemas = our_schemas()
    else:
        schemas = kuberay_schemas(request.getfixturevalue("shared_dir") / "kuberay")
    # Once for all objects: jsonschema.validate() would check the schema itself each time.
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}


@pytest.mark.parametrize("path", RAY)
def test_kuberay_accepts_its_objects(path: str, validators: dict[str, Any]) -> None:
    validators[RAY[path]["kind"]].validate(RAY[path])


@pytest.mark.parametrize(
    ("kind", "place", "wrong"),
    [
        ("RayCluster", "spec", {"enableInTreeAutoscalling": True}),
        ("RayCluster", "spec.authOptions", {"mode": "tokens"}),
        ("RayCluster", "spec.autoscalerOptions", {"idleTimeoutSeconds": "900"}),
        ("RayCluster", "spec.headGroupSpec", {"replicas": 1}),
        ("RayCluster", "spec.headGroupSpec.rayStartParams", {"num-cpus": 0}),
        ("RayCluster", "spec.headGroupSpec.template.spec", {"tolerationz": []}),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.0", {"ports": {}}),
        ("RayCluster", "spec.workerGroupSpecs.0", {"maxReplica": 8}),
        ("RayCluster", "spec.workerGroupSpecs.1", {"minReplicas": "0"}),
        ("RayJob", "spec", {"backofLimit": 2}),
        ("RayJob", "spec", {"shutdownAfterJobFinishes": "true"}),
        ("RayJob", "spec.rayClusterSpec", {"headGroupSpecs": {}}),
        ("RayJob", "spec.submitterPodTemplate.spec", {"restartPolicies": "Never"}),
    ],
)
def test_a_misspelt_field_or_a_wrong_type_is_rejected(
    kind: str, place: str, wrong: dict[str, Any], validators: dict[str, Any]
) -> None:
    document = copy.deepcopy(next(d for d in RAY.values() if d["kind"] == kind))
    target = document
    for name in place.split("."):
        target = target[int(name) if name.isdigit() else name]
    target |= wrong
    (error,) = validators[kind].iter_errors(document)
    assert ".".join(map(str, error.absolute_path)).startswith(place)
    assert next(iter(wrong)) in f"{error.message} {error.json_path}"


def test_a_missing_field_is_rejected(validators: dict[str, Any]) -> None:
    document = copy.deepcopy(RAY["kuberay/raycluster.yaml"])
    del document["spec"]["workerGroupSpecs"][0]["groupName"]
    with pytest.raises(jsonschema.ValidationError, match="'groupName' is a required property"):
        validators["RayCluster"].validate(document)


def test_our_schema_agrees_with_kuberays(shared_dir: Path) -> None:
    """Every field that we list is in the CRD, with the same type, choices and required fields."""
    theirs = kuberay_schemas(shared_dir / "kuberay")

    def compare(ours: dict[str, Any], crd: dict[str, Any], place: str) -> None:
        if "$ref" in ours:
            ours = schema["$defs"][ours["$ref"].removeprefix("#/$defs/")]
        assert ours.get("type") == crd.get("type"), place
        assert ours.get("anyOf") == crd.get("anyOf"), place
        below_the_object = place.count(".") > 1  # KubeRay itself requires no apiVersion
        if below_the_object:
            assert ours.get("enum") == crd.get("enum"), place
            assert set(crd.get("required", [])) <= set(ours.get("required", [])), place
        for name, value in ours.get("properties", {}).items():
            assert name in crd["properties"], f"{place}.{name}"
            compare(value, crd["properties"][name], f"{place}.{name}")
        for name in ("items", "additionalProperties"):
            if isinstance(ours.get(name), dict):
                compare(ours[name], crd[name], f"{place}.{name}")

    for kind, schema in our_schemas().items():
        compare(schema, theirs[kind], kind)


def pods() -> dict[str, dict[str, Any]]:
    """Every pod template of the KubeRay files, as a Pod."""
    made = {}
    for path, document in RAY.items():
        spec = document["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            made[f"{path}:{group.get('groupName', 'head')}"] = group["template"]
        if "submitterPodTemplate" in spec:
            made[f"{path}:submitter"] = spec["submitterPodTemplate"]
    return {
        name: {
            **template,
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "a", **template["metadata"]},
        }
        for name, template in made.items()
    }


PLAIN = [
    path for path in FILES if re.fullmatch(r"kuberay/(namespace|redis|storage-\w+)\.yaml", path)
]
"""Files whose objects are Kubernetes' own."""


def test_kubernetes_accepts_pods_and_namespace_objects() -> None:
    """By the schemas of Kubernetes itself, which KubeRay's CRDs only repeat."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[dev]'")
    latest = validator.latest_version()
    ours = [document for path in PLAIN for document in FILES[path]]
    for document in [*ours, *pods().values()]:
        validator.validate(copy.deepcopy(document), latest, strict=True)


def test_pods_pass_the_restricted_standard() -> None:
    for name, pod in pods().items():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            confined = container["securityContext"]
            assert confined["runAsNonRoot"] is True, name
            assert confined["allowPrivilegeEscalation"] is False, name
            assert confined["capabilities"] == {"drop": ["ALL"]}, name
            assert confined["seccompProfile"] == {"type": "RuntimeDefault"}, name
        kinds = {next(iter(set(v) - {"name"})) for v in pod["spec"].get("volumes", [])}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected"}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_machines_are_started_with_tokens_and_a_private_dashboard(cloud: str) -> None:
    (launcher,) = FILES[f"launcher/{cloud}.yaml"]
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    (start,) = [c for c in launcher["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start
    assert launcher["provider"]["use_internal_ips"] is True


def test_every_kubernetes_cluster_has_a_token_and_network_policies() -> None:
    ours = {"app.kubernetes.io/part-of": "vlv"}
    for document in RAY.values():
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        assert cluster["authOptions"] == {"mode": "token"}
    for name, pod in pods().items():
        assert pod["metadata"]["labels"].items() >= ours.items(), name
    policies = [o for o in FILES["kuberay/namespace.yaml"] if o["kind"] == "NetworkPolicy"]
    assert all(p["spec"]["podSelector"]["matchLabels"].items() >= ours.items() for p in policies)
    assert {kind for p in policies for kind in p["spec"]["policyTypes"]} == {"Ingress", "Egress"}


def test_only_the_head_connects_to_redis() -> None:
    """Only the long-running cluster has Redis: a job's own cluster ends with its head."""
    stateful_set, service, policy = FILES["kuberay/redis.yaml"]
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    for other in FILES["kuberay/namespace.yaml"]:
        if other["kind"] == "NetworkPolicy":  # policies add up: none lets in all of ours
            assert not labels.items() >= other["spec"]["podSelector"]["matchLabels"].items()
    assert service["spec"]["selector"] == labels == policy["spec"]["podSelector"]["matchLabels"]
    (rule,) = policy["spec"]["ingress"]
    (let_in,) = rule["from"]
    allowed = let_in["podSelector"]["matchLabels"].items()
    matching = {
        name for name, pod in pods().items() if pod["metadata"]["labels"].items() >= allowed
    }
    assert matching
    assert all(name.endswith(":head") for name in matching)
    standing = RAY["kuberay/raycluster.yaml"]["spec"]["gcsFaultToleranceOptions"]
    port = service["spec"]["ports"][0]["port"]
    assert standing["redisAddress"] == f"{service['metadata']['name']}:{port}"
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == standing["redisPassword"]["valueFrom"]
    for path, document in RAY.items():
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        assert ("gcsFaultToleranceOptions" in cluster) == (path == "kuberay/raycluster.yaml")


def test_machines_without_gpus_take_the_image_without_cuda() -> None:
    sizes = {**SIZES, "site": {**SIZES["site"], "image": "r/gpu:1", "cpu_image": "r/cpu:1"}}
    files = {
        path: list(yaml.safe_load_all(text))
        for path, text in rendered(sizes).items()
        if path.endswith("yaml")
    }
    (launcher,) = files["launcher/aws.yaml"]
    assert launcher["docker"]["image"] == "r/gpu:1"
    assert launcher["docker"]["head_image"] == "r/cpu:1"
    nodes = launcher["available_node_types"]
    assert nodes["cpu"]["docker"] == {"worker_image": "r/cpu:1"}
    assert not [name for name in nodes if name.startswith("gpu") and "docker" in nodes[name]]
    (job,) = files["kuberay/rayjob-stage1.yaml"]
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    images = {
        "head": cluster["headGroupSpec"]["template"],
        "workers": workers["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }
    found = {
        name: {
            c["image"]
            for c in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]
        }
        for name, template in images.items()
    }
    assert found == {"head": {"r/cpu:1"}, "workers": {"r/gpu:1"}, "submitter": {"r/cpu:1"}}
