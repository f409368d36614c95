"""What ``cluster/`` promises: manifests that their schemas take, and commands, flags and ports that ours are.

No cluster is started. Where kubectl is found, the overlays are built as ``kubectl apply -k`` builds them.
"""

import copy
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow
import pytest
import ray
import yaml
from ray._private import ray_constants
from ray.dashboard import http_server_agent
from ray.scripts.scripts import start

import eqm_dist
from eqm_dist.errors import ConfigError
from tests.test_docs import check, commands_in

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
YAML_FILES = sorted(CLUSTER.rglob("*.yaml"))
SCRIPTS = [CLUSTER / "own_ray.sh", *sorted((CLUSTER / "slurm").glob("*.sbatch"))]
KUBERNETES_VERSION = "1.34"
IN_IMAGE = "/opt/eqm-dist/"
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)

of_every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
of_every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def name_of(path: Path) -> str:
    return path.relative_to(CLUSTER).as_posix()


# --- reading ---


class Strict(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"a key twice: {keys}"
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, Strict) if document]


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within a document, however deep."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(part)


@cache
def built_text(overlay: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which builds overlays, is not installed here")
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> list[dict[str, Any]]:
    """The objects that an overlay is."""
    return documents(built_text(overlay))


def pods(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The specs of all pods that objects describe."""
    for each in objects:
        yield from (part for part in mappings(each) if isinstance(part.get("containers"), list))


# --- schemas ---


@cache
def ray_validator(kind: str) -> jsonschema.Draft7Validator:
    """Of the spec of a kind of KubeRay's."""
    schema = json.loads((ROOT / "tests" / "schemas" / f"{kind}-ray.io-v1.json").read_text())
    return jsonschema.Draft7Validator(_closed(schema["properties"]["spec"]))


def _closed(schema: Any) -> Any:
    """A schema that refuses unknown fields, which an API server would drop in silence."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def validate(document: dict[str, Any]) -> None:
    """Hold an object against the schema of its kind.

    Raises:
        jsonschema.ValidationError: it is not such an object.
    """
    if document["apiVersion"] == "ray.io/v1":
        validator = ray_validator(document["kind"])
        for error in validator.iter_errors(document["spec"]):
            raise error
    else:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_every_file_is_yaml_and_every_object_in_it_is_one(path: Path) -> None:
    found = documents(path.read_text(encoding="utf-8"))
    assert found
    for document in found:
        if document.get("kind") not in (None, "Kustomization", "Component"):
            validate(document)


@of_every_overlay
def test_every_overlay_builds_into_objects_that_their_schemas_take(overlay: str) -> None:
    objects = built(overlay)
    for each in objects:
        validate(each)
    kinds = [each["kind"] for each in objects if each["apiVersion"] == "ray.io/v1"]
    assert kinds == (["RayCluster"] if overlay == "standing" else ["RayJob"])


def test_a_wrong_object_is_found() -> None:
    (cluster,) = documents((KUBERNETES / "base" / "cluster.yaml").read_text())
    for wrong, path in ((1, "replica"), ("two", "replicas"), ([], "template")):
        broken = copy.deepcopy(cluster)
        broken["spec"]["workerGroupSpecs"][0][path] = wrong
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)
    (account,) = documents((KUBERNETES / "base" / "account.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate({**account, "metdata": {}})


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_launcher_files_are_what_ray_up_takes(cloud: str) -> None:
    (config,) = documents((CLUSTER / cloud / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(node.get("max_workers", 0) for node in types.values()) <= config["max_workers"]
    # Nothing but Ray's own port and SSH is opened by the launcher: the dashboard stays on the head's loopback.
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


# --- what pods may, and what they need ---


@of_every_overlay
def test_every_container_is_bounded_and_not_root(overlay: str) -> None:
    for pod in pods(built(overlay)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            own = container["securityContext"]
            assert (own["allowPrivilegeEscalation"], own["capabilities"]) == (False, {"drop": ["ALL"]})
            assert container["resources"]["requests"]["memory"]
            assert container["resources"]["limits"]["memory"]
            assert ":" in container["image"], "an image without a tag is another one tomorrow"
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = ("data",) if container["image"].startswith(("redis:", "postgres:")) else ()
            assert mounts <= {volume["name"] for volume in pod.get("volumes", [])} | set(claims)


@of_every_overlay
def test_secrets_are_named_and_never_there(overlay: str) -> None:
    objects = built(overlay)
    assert [each for each in objects if each["kind"] == "Secret"] == []
    names = {part["name"] for each in objects for part in mappings(each) if {"name", "key"} <= set(part)}
    names |= {part["secretRef"]["name"] for each in objects for part in mappings(each) if "secretRef" in part}
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert names
    for name in names:
        assert f"create secret generic {name} " in page, f"docs/kubernetes.md does not make the secret {name}"
    for part in (part for each in objects for part in mappings(each)):
        if re.search("PASSWORD|SECRET|TOKEN", str(part.get("name"))):
            assert "value" not in part, part


@of_every_overlay
def test_what_is_referred_to_by_name_is_there(overlay: str) -> None:
    objects = built(overlay)
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for pod in pods(objects):
        if account := pod.get("serviceAccountName"):
            assert ("ServiceAccount", account) in there
        for part in mappings(pod):
            if "configMapRef" in part:
                assert ("ConfigMap", part["configMapRef"]["name"]) in there
    services = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Service"}
    text = built_text(overlay)
    # Every address of this namespace is that of a service, which selects pods that listen there.
    addresses = set(re.findall(r"http://(\w+):(\d+)|redisAddress: (\w+):(\d+)", text))
    for name, port in ((one or three, two or four) for one, two, three, four in addresses):
        (at,) = services[name]["ports"]
        assert at["port"] == int(port)
        (workload,) = [
            each["spec"]["template"]
            for each in objects
            if each["kind"] in ("Deployment", "StatefulSet")
            and services[name]["selector"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        listening = [port["containerPort"] for part in workload["spec"]["containers"] for port in part["ports"]]
        assert at["targetPort"] in listening


@of_every_overlay
def test_probes_ask_what_ray_answers_without_a_token(overlay: str) -> None:
    head = (Path(ray.__file__).parent / "dashboard" / "http_server_head.py").read_text()
    public = {8265: set(re.findall(r'"(/api/\w*healthz)"', head)), 52365: set(http_server_agent.PUBLIC_EXACT_PATHS)}
    assert ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == 52365
    probes = [part["httpGet"] for each in built(overlay) if each["apiVersion"] == "ray.io/v1"
              for part in mappings(each) if "httpGet" in part]  # fmt: skip
    assert len(probes) == 4
    for probe in probes:
        assert probe["path"] in public[probe["port"]]


def test_an_elastic_job_asks_for_no_more_workers_than_its_cluster_may_have() -> None:
    for overlay in OVERLAYS:
        for job in (each for each in built(overlay) if each["kind"] == "RayJob"):
            (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            container = group["template"]["spec"]["containers"][0]
            gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 1))
            asked = re.search(r"--launch.workers (?:\[(\d+),(\d+)\]|(\d+))", job["spec"]["entrypoint"])
            assert asked is not None
            fewest, most = int(asked[1] or asked[3]), int(asked[2] or asked[3])
            assert (fewest, most) == (gpus * group["minReplicas"], gpus * group["maxReplicas"]), overlay


def test_versions_are_those_of_the_code() -> None:
    (cluster,) = documents((KUBERNETES / "base" / "cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == PINS["ray"]
    for path in (*YAML_FILES, CLUSTER / "docker" / "Dockerfile"):
        tags = re.findall(r'(?:eqm-dist:|newTag: ")(\d+\.\d+\.\d+)', path.read_text())
        assert set(tags) <= {eqm_dist.__version__}, path


# --- commands ---


def plain(text: str) -> str:
    """A text in which shell's arithmetic and variables, lists of YAML and folded lines have become plain arguments."""
    text = re.sub(r"\\\n\s*", " ", text).replace("python -u ", "python ")
    text = re.sub(r"\$\(\([^()]*\)\)", "8", text)
    text = re.sub(r'"\$(?:RUN_ROOT|SHARDS)"', "s3://bucket/x", text)
    # What YAML folds is one line, and a flag is never the first word of a command.
    return re.sub(r"\n\s+--(?=\w)", " --", text)


def our_commands(path: Path) -> list[tuple[str, list[str]]]:
    text = plain(path.read_text(encoding="utf-8").replace(IN_IMAGE, ""))
    found = [(program, arguments) for program, arguments in commands_in(text) if program != "make"]
    # A container's command as a list; spaces are as good.
    lists = "\n".join(" ".join(re.split(r",\s*", line)) for line in re.findall(r"command: \[(python, .*)\]", text))
    return found + list(commands_in(lists))


COMMANDED = {
    "kubernetes/components/job/job.yaml": "eqm-dist",
    "kubernetes/components/spot/kustomization.yaml": "cluster/spot_drain.py",
    "kubernetes/overlays/gpu/kustomization.yaml": "eqm-dist",
    "kubernetes/overlays/spot/kustomization.yaml": "eqm-dist",
    "kubernetes/overlays/cpu/kustomization.yaml": "eqm-dist",
    "slurm/train.sbatch": "pipelines/train.py",
    "slurm/train_shared.sbatch": "pipelines/train.py",
    "skypilot/train.yaml": "pipelines/train.py",
    "aws/cluster.yaml": "cluster/spot_drain.py",
    "gcp/cluster.yaml": "cluster/spot_drain.py",
}


@pytest.mark.parametrize("path", COMMANDED)
def test_commands_of_ours_can_be_given_as_they_stand(path: str) -> None:
    found = our_commands(CLUSTER / path)
    assert COMMANDED[path] in [program for program, _ in found]
    for program, arguments in found:
        check(program, [argument.replace("BUCKET", "bucket") for argument in arguments])


def test_every_run_writes_to_s3_and_has_a_name_that_a_retry_finds() -> None:
    runs = [arguments for path in COMMANDED for program, arguments in our_commands(CLUSTER / path)
            if "train" in [*arguments[:1], Path(program).stem]]  # fmt: skip
    assert len(runs) == 7
    for arguments in runs:
        assert arguments[arguments.index("--run.root") + 1].startswith("s3://")
        assert arguments[arguments.index("--run.name") + 1]


def test_a_wrong_flag_in_a_manifest_is_found(tmp_path: Path) -> None:
    text = (KUBERNETES / "overlays" / "gpu" / "kustomization.yaml").read_text()
    path = tmp_path / "kustomization.yaml"
    for right, wrong in (("--data.shards", "--data.shard"), ("--launch.workers 16", "--launch.workers many")):
        assert right in text
        path.write_text(text.replace(right, wrong))
        ((program, arguments),) = our_commands(path)
        with pytest.raises(ConfigError):
            check(program, arguments)


def ray_starts() -> Iterator[tuple[str, list[str]]]:
    """The arguments of every ``ray start``, and of what ``ray symmetric-run`` hands on to it."""
    for path in (CLUSTER / "aws" / "cluster.yaml", CLUSTER / "gcp" / "cluster.yaml"):
        (config,) = documents(path.read_text())
        for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
            if command.startswith("ray start"):
                yield name_of(path), shlex.split(command)[2:]
    for service in compose()["services"].values():
        if service.get("command", [])[:2] == ["ray", "start"]:
            yield "compose.yaml", service["command"][2:]
    own = plain((CLUSTER / "own_ray.sh").read_text())
    (ports,) = re.findall(r"ports=\((.*?)\)$", own, flags=re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^ *ray start (.*?)(?: >\S+)? &$", own, flags=re.MULTILINE):
        words = shlex.split(line.replace('"${ports[@]}"', ports.replace("\n", " ")).replace('"${options[@]}"', ""))
        yield "own_ray.sh", [re.sub(r"\$\w+", "1", word) for word in words]
    sbatch = plain((CLUSTER / "slurm" / "train.sbatch").read_text())
    (handed,) = re.findall(r"symmetric-run .*?--min-nodes \S+ +(.*?) -- ", sbatch)
    yield "train.sbatch", [re.sub(r"\$\w+", "1", word) for word in shlex.split(handed)]


def test_ray_takes_the_options_with_which_it_is_started() -> None:
    found = list(ray_starts())
    assert [name for name, _ in found].count("own_ray.sh") == 2
    assert len(found) == 9
    for name, arguments in found:
        left = start.make_parser(start.make_context("start", [], resilient_parsing=True)).parse_args(list(arguments))[1]
        assert left == [], (name, left)


def test_mlflow_takes_the_options_with_which_it_is_served() -> None:
    # Read and not imported, which takes six seconds.
    text = (Path(mlflow.__file__).parent / "cli" / "__init__.py").read_text() + (
        Path(mlflow.__file__).parent / "utils" / "cli_args.py"
    ).read_text()
    deployment = documents((KUBERNETES / "mlflow" / "mlflow.yaml").read_text())[1]
    of_pod = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    for command in (of_pod, compose()["services"]["mlflow"]["command"]):
        assert command[:2] == ["mlflow", "server"]
        given = dict(argument.split("=", 1) for argument in command[2:])
        for flag in given:
            assert f'"{flag}"' in text, flag
        assert "*" not in given["--allowed-hosts"].split(",")
        assert "mlflow:5000" in given["--allowed-hosts"].split(",")


ASK = """
import json, os, sys, urllib.error, urllib.request
import ray

def status(port, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code

base = int(sys.argv[1])
ports = {8265: base + 7, 52365: base + 3}
ray.init(log_to_driver=False, logging_level="ERROR")
answers = [status(ports[port], path) for port, path in json.loads(sys.argv[2])]
print("answers", json.dumps([*answers, status(ports[8265], "/api/jobs/"), os.environ["RAY_ADDRESS"]]))
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_its_own_answers_the_probes_refuses_the_rest_and_ends(tmp_path: Path) -> None:
    (cluster,) = documents((KUBERNETES / "base" / "cluster.yaml").read_text())
    asked = [part["httpGet"] for part in mappings(cluster) if "httpGet" in part]
    probes = sorted({(probe["port"], probe["path"]) for probe in asked})
    token = tmp_path / "token"
    token.write_text("7" * 64)
    base = 20_000 + os.getpid() % 150 * 200
    done = subprocess.run(
        [CLUSTER / "own_ray.sh", "0", "1", "127.0.0.1", str(base), "--num-cpus", "1",
         "--object-store-memory", "100000000", "--", sys.executable, "-c", ASK, str(base), json.dumps(probes)],
        env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(token), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("answers ")]
    assert json.loads(line.removeprefix("answers ")) == [200] * len(probes) + [401, f"127.0.0.1:{base}"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", base), timeout=5)


# --- scripts ---


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A linter that the development environment brings as a wheel, on platforms for which there is one."""
    if (program := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed: there is no wheel of it for this platform")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


@of_every_script
def test_scripts_are_bash_without_known_mistakes(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.stat().st_mode & 0o111 or script.suffix == ".sbatch"
    found = tool("shellcheck", script)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_script_in_the_skypilot_file_is_bash_without_known_mistakes(tmp_path: Path) -> None:
    (task,) = documents((CLUSTER / "skypilot" / "train.yaml").read_text())
    assert set(task["secrets"].values()) == {None}
    script = tmp_path / "run.sh"
    given = "".join(f"export {name}=x\n" for name in (*task["envs"], *task["secrets"]))
    script.write_text(f"#!/usr/bin/env bash\n{given}{task['run']}")
    found = tool("shellcheck", "--exclude=SC2154", script)
    assert (found.returncode, found.stdout) == (0, "")


def test_a_mistake_in_a_script_is_found(tmp_path: Path) -> None:
    script = tmp_path / "wrong.sh"
    script.write_text("#!/usr/bin/env bash\nrm -rf $1/*\n")
    assert tool("shellcheck", script).returncode != 0


@of_every_script
def test_scripts_keep_the_token_from_others(script: Path) -> None:
    text = script.read_text()
    assert "RAY_AUTH_TOKEN_PATH" in text
    if script.suffix == ".sbatch":
        assert text.index("umask 077") < text.index("openssl rand")
        assert "#SBATCH --requeue" in text


# --- the image ---


def copied() -> set[str]:
    """What the image gets of the repository."""
    lines = re.findall(r"^COPY --chown=\S+ (.*) \S+$", (CLUSTER / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    return {word for line in lines for word in line.split()}


def test_the_dockerfile_has_no_known_mistakes() -> None:
    found = tool("hadolint", CLUSTER / "docker" / "Dockerfile")
    assert (found.returncode, found.stdout) == (0, "")


def test_the_context_is_what_the_image_copies_and_nothing_else() -> None:
    lines = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    for name in copied():
        assert (ROOT / name).exists()


def test_the_image_is_not_roots_and_has_the_pinned_versions() -> None:
    text = (CLUSTER / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000"
    installs = re.findall(r"pip install ([^&]*?)(?=&&|\n\n|\n[A-Z])", text.replace("\\\n", " "))
    assert len(installs) == 2
    for install in installs:
        assert "--constraint constraints.txt" in install


def test_manifests_name_only_files_that_the_image_has() -> None:
    named = {name for path in YAML_FILES for name in re.findall(rf"{IN_IMAGE}([\w./]+)", path.read_text())}
    (task,) = documents((CLUSTER / "skypilot" / "train.yaml").read_text())
    named |= set(re.findall(r"^ *(?:python -u )?((?:cluster|pipelines)/[\w.]+)", task["run"], re.MULTILINE))
    assert {"cluster/spot_drain.py", "cluster/own_ray.sh", "pipelines/train.py"} <= named
    for name in named:
        assert any(name == each or name.startswith(f"{each}/") for each in copied()), name


# --- compose ---


@cache
def compose() -> dict[str, Any]:
    (found,) = documents((CLUSTER / "docker" / "compose.yaml").read_text())
    return found


def test_compose_is_whole_and_publishes_on_this_machine_only() -> None:
    services = compose()["services"]
    assert set(services) == {"head", "worker", "mlflow", "postgres", "s3", "make-bucket"}
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        for waited, how in service["depends_on"].items() if isinstance(service.get("depends_on"), dict) else ():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[waited]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose()["volumes"]


def test_compose_has_no_secret_and_refuses_to_start_without_them() -> None:
    text = (CLUSTER / "docker" / "compose.yaml").read_text()
    secrets = set(re.findall(r"\$\{(\w+):\?", text))
    assert set(re.findall(r"\$\{(\w+)", text)) == {*secrets, "EQM_IMAGE"}
    page = (ROOT / "docs" / "laptop.md").read_text(encoding="utf-8")
    for name in secrets:
        assert f"{name}=$(openssl rand" in page, f"docs/laptop.md does not make {name}"
