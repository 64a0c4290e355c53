"""What must hold in docker/ and can be read from the files: no Docker is needed."""

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import compose_spec
import kubernetes_validate
import pytest
import yaml
from docker_files import DOCKER, ROOT, compose, dockerfile, gpu_job, health_check, manifests

from d3etr.config.data import DigitScenesConfig
from d3etr.config.infrastructure import RunConfig
from d3etr.config.load import load_config

SERVICES: dict[str, dict[str, Any]] = compose()["services"]
RAY_JOB = manifests()["RayJob"]["spec"]
CLUSTER = RAY_JOB["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = [group["template"]["spec"] for group in GROUPS]
CONTAINERS = [container for pod in PODS for container in pod["containers"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.lower().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)
FILES = sorted(path for path in DOCKER.rglob("*") if path.is_file() and "secrets" not in path.parts)
GUIDE = ROOT / "docs" / "cluster.md"
KUBERNETES = "1.31"
"""Version whose schemas the pods and the claim are compared with."""
SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|KEY")


def instructions(keyword: str) -> list[str]:
    """What follows each use of a keyword in the Dockerfile."""
    return [rest for name, rest in dockerfile() if name == keyword]


def workdir() -> str:
    """Where the project is in the image."""
    return instructions("WORKDIR")[-1]


def images() -> Iterator[str]:
    """Every image that is pulled."""
    stages: set[str] = set()
    for rest in instructions("FROM"):
        image, _, stage = rest.partition(" AS ")
        if image not in stages:
            yield image
        stages.add(stage)
    yield from (service["image"] for service in SERVICES.values())
    yield from (container["image"] for container in CONTAINERS)


@pytest.mark.parametrize("image", sorted(set(images())))
def test_images_are_pinned_to_a_release(image: str) -> None:
    name, _, tag = image.partition(":")
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?(-[a-z]+)*", tag), f"{image} may change under its tag"
    if name == "d3etr":
        assert tag.startswith(PROJECT["version"] + "-")


def test_the_images_python_is_the_one_that_the_constraints_were_made_with() -> None:
    (python,) = (image for image in set(images()) if image.startswith("python:"))
    minor = ".".join(python.partition(":")[2].split(".")[:2])
    assert f"Python {minor}" in (ROOT / "constraints.txt").read_text().splitlines()[0]


def test_everything_that_the_image_installs_is_pinned() -> None:
    installs = re.findall(r"pip install ([^&]*)", " ".join(instructions("RUN")))
    assert len(installs) == 2
    assert all("-c constraints.txt" in install for install in installs)
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["server"], *extras["s3"], *extras["serve"]]
    names = {re.split(r"[\[><=]", requirement)[0].lower() for requirement in wanted}
    assert names <= set(CONSTRAINTS)


def test_ray_is_the_same_version_everywhere() -> None:
    assert CLUSTER["rayVersion"] == CONSTRAINTS["ray"]


def test_the_image_runs_as_a_user_without_rights() -> None:
    user, group = (int(number) for number in instructions("USER")[-1].split(":"))
    assert user > 0 and group > 0
    assert [name for name, _ in dockerfile()].index("USER") > max(
        place for place, (name, _) in enumerate(dockerfile()) if name in ("RUN", "COPY")
    )
    for pod in PODS:
        rights = pod["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert (rights["runAsUser"], rights["runAsGroup"], rights["fsGroup"]) == (
            user,
            group,
            group,
        )
    for container in CONTAINERS:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_every_service_has_a_health_check() -> None:
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    assert f"127.0.0.1:{DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/healthz" in health_check()[-1]
    for name, service in SERVICES.items():
        of_image = service["image"].startswith("d3etr:") and "ray start" in service["command"]
        assert of_image or "test" in service["healthcheck"], name


def test_the_operator_asks_pods_over_http_as_the_image_has_no_wget() -> None:
    assert not any("wget" in text for _, text in dockerfile())
    files = (DOCKER / "kubernetes" / "rayjob.yaml", GUIDE)
    needed = [re.findall(r"(\d+\.\d+\.\d+) or newer", file.read_text()) for file in files]
    assert needed == [["1.6.0"]] * 2
    # From that operator on, of clusters of Ray 2.53 on; others are asked by wget.
    assert tuple(int(part) for part in CLUSTER["rayVersion"].split(".")) >= (2, 53)


def test_ports_are_published_on_loopback_unless_told_otherwise() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]
    raw = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    ports = [port for service in raw.values() for port in service.get("ports", [])]
    assert all(port.startswith("${D3ETR_BIND:-127.0.0.1}:") for port in ports)
    assert not any("network_mode" in service for service in SERVICES.values())


def test_secrets_come_from_files_alone() -> None:
    declared = {name: entry["file"] for name, entry in compose()["secrets"].items()}
    assert declared == {name: f"secrets/{name}" for name in declared}
    for name, service in SERVICES.items():
        granted = {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
        read = {
            value
            for variable, value in service["environment"].items()
            if SECRET_NAME.search(variable)
        }
        assert read == granted, name
        assert {path.removeprefix("/run/secrets/") for path in granted} <= set(declared)
    for container in CONTAINERS:
        assert not any(SECRET_NAME.search(entry["name"]) for entry in container["env"])
    assert CLUSTER["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b[0-9a-fA-F]{24,}\b|[A-Za-z0-9+/]{40,}={1,2}", text)
    assert not re.search(
        r"(?i)(password|token|secret_key|access_key)\s*[:=]\s*['\"]?\w{4,}['\"]?$", text
    )


def test_secrets_are_made_once_and_stay(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = ["sh", str(DOCKER / "make-secrets.sh"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in folder.iterdir() if path.name != ".gitignore"}
    assert set(made) == set(compose()["secrets"])
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())
    assert len(set(made.values())) == len(made)
    assert folder.stat().st_mode & 0o777 == 0o700  # keeps other users of the machine out
    assert all((folder / name).stat().st_mode & 0o777 == 0o444 for name in made)
    assert (folder / ".gitignore").read_text() == "*\n"
    (folder / "ray_token").unlink()
    subprocess.run(command, check=True, capture_output=True)
    again = {name: (folder / name).read_text() for name in made}
    assert again.pop("ray_token") != made.pop("ray_token")
    assert again == made


def test_addresses_name_services_and_their_ports() -> None:
    text = yaml.safe_dump([[s["environment"], s.get("command")] for s in SERVICES.values()])
    found = set(re.findall(r"(?:https?://|--address=)([a-z]\w*):(\d+)", text))
    assert found == {("mlflow", "5000"), ("s3", "9000"), ("head", "6379")}
    assert SERVICES["mlflow"]["environment"]["POSTGRES_HOST"] in SERVICES
    assert "--port=6379" in SERVICES["head"]["command"]
    assert "--port 5000" in SERVICES["mlflow"]["command"]
    assert SERVICES["s3"]["environment"]["RUSTFS_ADDRESS"] == ":9000"
    assert "mlflow:5000" in SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]


def test_mlflow_and_postgresql_mean_the_same_database() -> None:
    names = ("POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE")
    client, server = SERVICES["mlflow"]["environment"], SERVICES["postgres"]["environment"]
    assert [client[name] for name in names] == [server[name] for name in names]


def test_services_wait_for_healthy_ones() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert set(waits["mlflow"]) == {"postgres", "s3"}
    assert set(waits["head"]) == {"mlflow"} and set(waits["worker"]) == {"head"}
    conditions = [wait["condition"] for wait in waits.values() for wait in wait.values()]
    assert conditions == ["service_healthy"] * 4


def options(command: click.Command) -> set[str]:
    """The options that a command takes."""
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_commands_use_options_that_exist() -> None:
    from mlflow.cli import server
    from ray.scripts.scripts import start

    for name, known in (("head", start), ("worker", start), ("mlflow", server)):
        words = shlex.split(SERVICES[name]["command"])
        assert {word.partition("=")[0] for word in words if word[:2] == "--"} <= options(known)
    for group in GROUPS:
        assert {f"--{name}" for name in group["rayStartParams"]} <= options(start)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_volumes_are_where_recipes_look() -> None:
    places = {workdir() + f"/{folder}" for folder in (RunConfig().output, "data")}
    assert DigitScenesConfig().root.parts[0] == "data"
    for name in ("head", "worker"):
        assert {volume.partition(":")[2] for volume in SERVICES[name]["volumes"]} == places
    for container in CONTAINERS:
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == places | {"/dev/shm"}
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    }
    assert named == set(compose()["volumes"])
    assert f"install -d -o 1000 -g 1000 {' '.join(sorted(places, reverse=True))}" in " ".join(
        instructions("RUN")
    )


def training_commands() -> Iterator[tuple[str, str]]:
    """Every ``python trainers/run.py`` with a recipe's path in docker/ and in the guide."""
    yield "rayjob.yaml", RAY_JOB["entrypoint"]
    for path in [*FILES, GUIDE]:
        text = re.sub(r"\\\n[#\s]*", "", path.read_text())
        for found in re.findall(r"python trainers/run\.py [^\n`]*?\.yaml[^\n`]*", text):
            yield path.name, found.partition("#")[0]


COMMANDS = sorted(set(training_commands()))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda pair: f"{pair[0]}: {pair[1][:60]}")
def test_training_commands_are_valid_and_fit(
    command: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command[1])[2:]
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    config = load_config(Path(words[0]), overrides)
    if command[0] == "rayjob.yaml":
        (group,) = CLUSTER["workerGroupSpecs"]
        cpus = group["replicas"] * int(group["rayStartParams"]["num-cpus"])
        assert config.cluster.workers * config.cluster.cpus_per_worker <= cpus
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def test_the_ray_job_has_only_fields_that_kuberay_knows() -> None:
    assert set(RAY_JOB) <= {
        *("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
        *("rayClusterSpec", "submissionMode", "runtimeEnvYAML", "activeDeadlineSeconds"),
    }
    assert set(CLUSTER) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    for group in CLUSTER["workerGroupSpecs"]:
        required = {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert required <= set(group) <= required | {"replicas", "numOfHosts"}


@pytest.mark.parametrize("job", [manifests()["RayJob"], gpu_job()], ids=["CPUs", "GPUs"])
def test_pods_and_claim_are_what_kubernetes_takes(job: dict[str, Any]) -> None:
    cluster, metadata = job["spec"]["rayClusterSpec"], {"name": "any"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}
        for group in groups
    ]
    for document in [manifests()["PersistentVolumeClaim"], *pods]:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_what_the_specification_allows(name: str) -> None:
    document = compose(name)
    read = compose_spec.PyCompose.from_json(json.dumps(document))
    assert set(read.to_dict()["services"]) == set(document["services"])
    document["services"]["worker"]["stop_grace_periods"] = "45s"
    with pytest.raises(ValueError, match="stop_grace_periods"):
        compose_spec.PyCompose.from_json(json.dumps(document))


def test_pods_use_the_claim_that_is_made() -> None:
    claim = manifests()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in PODS:
        shared, memory = pod["volumes"]
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert memory["emptyDir"]["medium"] == "Memory"
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) == {shared["name"], memory["name"]}
            assert mounts[memory["name"]] == "/dev/shm"


def test_memory_volumes_hold_what_ray_puts_there_and_fit_into_the_containers() -> None:
    sizes = {"Gi": 2**30, "Mi": 2**20}

    def size(text: str) -> int:
        return int(text[:-2]) * sizes[text[-2:]]

    for group, pod in zip(GROUPS, PODS, strict=True):
        memory = size(pod["volumes"][1]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) <= memory
        for container in pod["containers"]:
            assert memory <= size(container["resources"]["limits"]["memory"]) // 2


def test_the_job_with_gpus_is_the_same_but_for_image_gpus_and_room() -> None:
    job = gpu_job()["spec"]["rayClusterSpec"]
    head, (worker,) = job["headGroupSpec"], job["workerGroupSpecs"]
    containers = [group["template"]["spec"]["containers"][0] for group in (head, worker)]
    assert {each["image"] for each in containers} == {f"d3etr:{PROJECT['version']}-cuda"}
    needs = containers[1]["resources"]
    assert needs["requests"]["nvidia.com/gpu"] == needs["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in containers[0]["resources"]["requests"]
    assert needs["limits"]["cpu"] == worker["rayStartParams"]["num-cpus"]
    for container, plain in zip(containers, CONTAINERS, strict=True):
        changed = {key for key in container if container[key] != plain[key]}
        assert changed <= {"image", "resources"} and set(container) == set(plain)
    base = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())
    assert base["resources"] == ["rayjob.yaml"]


def test_the_build_sees_what_it_needs_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*", "what is not named must stay out"
    assert let_in == {
        *("pyproject.toml", "constraints.txt", "platform", "trainers", "sweeps"),
        "docker/mlflow_server.py",
    }
    assert all((ROOT / path).exists() for path in let_in)


def test_the_guide_names_files_that_exist() -> None:
    text = GUIDE.read_text()
    named = set(re.findall(r"(?:docker|tests|trainers|docs)/[\w./-]+\.\w+", text))
    assert {"docker/compose.yaml", "docker/kubernetes/rayjob.yaml"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.fixture
def mlflow_server() -> ModuleType:
    """docker/mlflow_server.py as a module."""
    spec = importlib.util.spec_from_file_location("mlflow_server", DOCKER / "mlflow_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mlflow_servers_arguments_hold_no_password(
    mlflow_server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in SERVICES["mlflow"]["environment"].items():
        monkeypatch.setenv(name, str(value))
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"):
        monkeypatch.setenv(name, "")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "secret").write_text("p@ss/word\n")
    for name in ("POSTGRES_PASSWORD_FILE", "S3_ACCESS_KEY_FILE", "S3_SECRET_KEY_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "secret"))
    monkeypatch.setattr(mlflow_server, "make_bucket", lambda name: None)
    monkeypatch.setattr("sys.argv", ["mlflow_server.py", "--port", "5000"])
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda program, arguments: started.append(arguments))
    mlflow_server.main()
    assert started == [["mlflow", "server", "--port", "5000"]]
    address = "postgresql+psycopg2://mlflow:p%40ss%2Fword@postgres:5432/mlflow"
    environment = mlflow_server.os.environ
    assert environment["MLFLOW_BACKEND_STORE_URI"] == address
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow"
    assert environment["AWS_SECRET_ACCESS_KEY"] == "p@ss/word"
