"""The files of cluster/deploy, which no test can deploy: against Ray's schema, KubeRay's fields, and our own rules."""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

jsonschema = pytest.importorskip("jsonschema")

DEPLOY = Path(__file__).resolve().parent.parent / "cluster" / "deploy"
LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml")
DOCKER = ("Dockerfile.cpu", "Dockerfile.cuda")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def every(value: Any) -> Iterator[Any]:
    """All mappings and plain values within `value`."""
    yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from every(one)


# What KubeRay 1.6.2 takes: the fields of docs/reference/api.md of ray-project/kuberay (Apache-2.0) that are used here,
# unknown ones refused. Pods are checked further below.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {"spec": {"type": "object"}},
}


def fields(required: list[str], **known: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": known}


CLUSTER_SPEC = fields(
    ["headGroupSpec", "authOptions"],
    rayVersion={"type": "string"},
    authOptions=fields(["mode", "secretName"], mode={"const": "token"}, secretName={"type": "string"}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=fields([], version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=fields(["template", "rayStartParams"], rayStartParams=TEXTS, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
            groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=POD,
        ),
    },
)  # fmt: skip
JOB_SPEC = fields(
    ["entrypoint", "rayClusterSpec"],
    entrypoint={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT, activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes={"type": "boolean"}, ttlSecondsAfterFinished=COUNT,
    submitterConfig=fields([], backoffLimit=COUNT), submitterPodTemplate=POD, rayClusterSpec=CLUSTER_SPEC,
)  # fmt: skip
CRON_SPEC = fields(
    ["schedule", "jobTemplate"],
    schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"}, suspend={"type": "boolean"}, jobTemplate=JOB_SPEC,
)  # fmt: skip
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC, "RayCronJob": CRON_SPEC}


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_files_follow_rays_own_schema(name: str) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(name)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 1}, schema)


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_machines_are_private_and_ask_for_a_token(name: str) -> None:
    (config,) = documents(name)
    assert config["provider"]["use_internal_ips"] is True and config["provider"]["cache_stopped_nodes"] is False
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in one for one in starts if "ray start" in one)
    assert sum("ray start" in one for one in starts) == 2
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1] and "0.0.0.0" not in str(config)
    types = config["available_node_types"]
    assert set(types) == {"head", "decode", "gpu"} and config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0} and types["gpu"]["resources"]["GPU"] == 1
    assert "cuda" in types["gpu"]["docker"]["worker_image"] and config["docker"]["image"].endswith("cpu")
    for one in types.values():
        node = one["node_config"]
        if name == "aws.yaml":
            assert [disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"]] == [True]
            assert node["MetadataOptions"]["HttpTokens"] == "required"
        else:
            assert all("kmsKeyName" in disk["diskEncryptionKey"] for disk in node["disks"])
            assert all("accessConfigs" not in one for one in node["networkInterfaces"])


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_hold_known_fields_only(name: str) -> None:
    (made,) = documents(f"kuberay/{name}")
    assert made["apiVersion"] == "ray.io/v1" and set(made) == {"apiVersion", "kind", "metadata", "spec"}
    assert made["kind"].lower() == name.removesuffix(".yaml")
    jsonschema.validate(made["spec"], SPECS[made["kind"]])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made["spec"], "authOption": {}}, SPECS[made["kind"]])


def cluster_spec(made: dict[str, Any]) -> dict[str, Any]:
    spec = made["spec"]
    return spec.get("jobTemplate", spec).get("rayClusterSpec", spec)  # type: ignore[no-any-return]


def test_the_same_cluster_is_described_everywhere() -> None:
    """YAML has no includes: the three files repeat it."""
    first, *others = [cluster_spec(documents(f"kuberay/{name}")[0]) for name in KUBERAY]
    assert others == [first, first]
    groups = {group["groupName"]: group for group in first["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"} and all(one["minReplicas"] == 0 for one in groups.values())
    assert first["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def pods() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name in (*KUBERAY, "cronjob.yaml"):
        for document in documents(f"kuberay/{name}"):
            found += [(name, one) for one in every(document) if isinstance(one, dict) and "containers" in one]
    return found


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda one: one if isinstance(one, str) else "pod")
def test_pods_are_confined_and_complete(name: str, pod: dict[str, Any]) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] >= 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {one["name"] for one in pod.get("volumes", [])}
    assert not any({"hostPath"} & set(one) for one in pod.get("volumes", []))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for one in pod["containers"]:
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(one["resources"]["requests"]) and "memory" in one["resources"]["limits"]
        assert re.search(r":[\w.-]*\d[\w.-]*$", one["image"]) and not one["image"].endswith("latest")
        mounted = [mount["name"] for mount in one.get("volumeMounts", [])]
        assert set(mounted) <= volumes and len(mounted) == len(set(mounted))
        assert not [variable for variable in one.get("env", []) if "value" in variable and "TOKEN" in variable["name"]]
    needs_api = any(one["name"] in ("ray-head", "create") for one in pod["containers"])  # autoscaler, kubectl
    assert needs_api or pod["automountServiceAccountToken"] is False


def test_the_cron_job_may_only_create_ray_jobs() -> None:
    account, role, binding, job = documents("kuberay/cronjob.yaml")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] and job["spec"]["concurrencyPolicy"] == "Forbid"
    (made,) = documents("kuberay/rayjob.yaml")
    assert "generateName" in made["metadata"] and "name" not in made["metadata"]  # `kubectl create` makes a new one


def test_the_network_policy_lets_in_the_cluster_and_its_operator_only() -> None:
    (policy,) = documents("kuberay/network.yaml")
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    own, *others = policy["spec"]["ingress"]
    assert own["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert all(one["ports"] == [{"port": 8265}] and one["from"] for one in others)


def instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / name).read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("name", DOCKER)
def test_images_are_pinned_unprivileged_and_hold_code_only(name: str, root: Path) -> None:
    steps = instructions(name)
    assert {word for word, _ in steps} <= {
        "FROM",
        "USER",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "CMD",
    }  # no ADD, ARG, EXPOSE
    (base,) = [rest for word, rest in steps if word == "FROM"]
    ray = re.search(r"^ray==(\S+)", (root / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert ray is not None and re.fullmatch(rf"rayproject/ray:{re.escape(ray[1])}-py312-(cpu|gpu)", base)
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["ray"] and [word for word, _ in steps].index("USER") == 1
    copied = [one for word, rest in steps if word == "COPY" for one in rest.split()[1:-1]]
    allowed = {"constraints-cpu.txt", "pyproject.toml", "README.md", "LICENSE", "operators", "cluster", "pipeline",
               "configs", "seeds/catalogue"}  # fmt: skip
    assert set(copied) <= allowed and all((root / one).exists() for one in copied)
    ran = " ".join(rest for word, rest in steps if word == "RUN")
    assert "--no-cache-dir" in ran and not re.search(r"curl|wget|sudo|apt|trusted-host|http://", ran)
    environment = dict(one.split("=", 1) for word, rest in steps if word == "ENV" for one in rest.split())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert not [key for key in environment if re.search("TOKEN|SECRET|PASSWORD|KEY", key)]
    listed = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    rules = [line for line in listed if line and not line.startswith("#")]
    assert rules[0] == "*" and {one.removeprefix("!") for one in rules if one.startswith("!")} == allowed


def test_the_rays_of_images_and_manifests_are_one(root: Path) -> None:
    ray = re.search(r"^ray==(\S+)", (root / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert ray is not None
    for name in KUBERAY:
        assert cluster_spec(documents(f"kuberay/{name}")[0])["rayVersion"] == ray[1]


def files() -> list[Path]:
    return [path for path in sorted(DEPLOY.rglob("*")) if path.is_file()]


def test_there_is_no_secret_or_account_in_any_file_and_placeholders_are_plain() -> None:
    forbidden = {
        "AWS access key": r"\bA(KIA|SIA)[A-Z0-9]{12,}",
        "AWS account": r"(?<![\w.])\d{12}(?!\w)",
        "AWS resource": r"\b(ami|subnet|vpc|sg|fs)-[0-9a-f]{8,}",
        "private key": r"BEGIN [A-Z ]*PRIVATE KEY",
        "long random value": r"\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40,}={0,2}\b",
        "project of Google": r"projects/(?!REPLACE)[a-z]",
        "machine path": r"/home/(?!ray\b)|/Users/|/root/",
    }
    for path in files():
        text = path.read_text()
        for what, pattern in forbidden.items():
            assert not re.search(pattern, text), (path.name, what)
        if "REPLACE" in text and path.suffix == ".yaml" and path.name != "cronjob.yaml":
            assert "REPLACE-" in text and not re.search(r"REPLACE(?!-)", text), path.name
    for name in LAUNCHER:
        (config,) = documents(name)
        account_bound = [one for one in every(config) if isinstance(one, str) and "REPLACE-" in one]
        assert len(account_bound) >= 6


@pytest.mark.parametrize("name", [path.relative_to(DEPLOY).as_posix() for path in files() if path.suffix == ".yaml"])
def test_values_are_explained(name: str) -> None:
    """At least one line of comment for six lines of values."""
    lines = (DEPLOY / name).read_text().splitlines()
    comments = sum(line.lstrip().startswith("#") for line in lines)
    assert lines[0].startswith("#") and comments * 6 >= len(lines) - comments


STUBS = {
    # srun: takes its options off and runs the command here, as if on a node; notes every word it is given
    "srun": 'echo "srun $*" >> "$NOTES"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'echo "ray $* mode=$RAY_AUTH_MODE token=$(wc -c < "$RAY_AUTH_TOKEN_PATH") '
    '$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" >> "$NOTES"; exec sleep 60',
    "python": 'echo $(($(grep -c "^ray " "$NOTES") + 1))',  # how many nodes joined: the workers' two start as one here
    "unveil": 'cat "$RAY_AUTH_TOKEN_PATH" > "$NOTES.token"; echo "unveil $*" >> "$NOTES"; exit 2',
    "hostname": "if [ \"$1\" = --ip-address ]; then echo \"$ADDRESS\"; else echo node1; fi",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm job whose commands are stubs."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    number = str(10**6 + os.getpid())
    yield {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "8",
        "UNVEIL_HEAD_SECONDS": "0.1", "UNVEIL_WAIT_SECONDS": "0.1",
        "ADDRESS": "127.0.0.1 10.1.2.3",
    }  # fmt: skip
    shutil.rmtree(f"/tmp/unveil-slurm-{number}", ignore_errors=True)


def test_the_slurm_script_starts_head_and_workers_with_a_token_and_hands_the_code_back(slurm: dict[str, str]) -> None:
    script = DEPLOY / "slurm.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    words = ["run", "/shared/a b.yaml", "title=x y"]
    done = subprocess.run(["bash", str(script), *words], env=slurm, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2, done.stderr
    notes = Path(slurm["NOTES"]).read_text()
    started = [line for line in notes.splitlines() if line.startswith("ray ")]
    assert len(started) == 2 and all("mode=token token=64 600" in line for line in started)
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 20000
    assert f"--head --block --node-ip-address=10.1.2.3 --port={port} --dashboard-host=127.0.0.1" in started[0]
    assert f"--block --address=10.1.2.3:{port}" in started[1]
    assert f"unveil run /shared/a b.yaml title=x y ray.address=10.1.2.3:{port}" in notes
    token = Path(slurm["NOTES"] + ".token").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token) and token not in notes + done.stdout + done.stderr
    assert list(Path(slurm["HOME"], ".unveil").iterdir()) == []
    assert not Path(f"/tmp/unveil-slurm-{slurm['SLURM_JOB_ID']}").exists()
    assert re.search(r"srun .*mkdir -m 700", notes)


def test_the_slurm_script_refuses_public_addresses_and_missing_words(slurm: dict[str, str]) -> None:
    script = str(DEPLOY / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    assert subprocess.run(["bash", script, "run"], env=slurm, capture_output=True).returncode == 1
    public = slurm | {"ADDRESS": "203.0.113.5"}
    done = subprocess.run(["bash", script, "run", "a.yaml"], env=public, capture_output=True, text=True)
    assert done.returncode == 1 and "203.0.113.5 is not a private address" in done.stderr
    assert not Path(slurm["NOTES"]).exists() and not Path(slurm["HOME"], ".unveil").exists()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
