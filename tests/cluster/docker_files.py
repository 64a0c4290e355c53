"""The files in docker/, read."""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"


def dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: keyword, and the rest on one line."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines).splitlines()
    pairs = (line.partition(" ") for line in joined if line)
    return [(keyword, rest.strip()) for keyword, _, rest in pairs]


def health_check() -> list[str]:
    """The command of the image's HEALTHCHECK."""
    (check,) = (rest for keyword, rest in dockerfile() if keyword == "HEALTHCHECK")
    command: list[str] = yaml.safe_load(check.partition("CMD ")[2])
    return command


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """A compose file with every ``${NAME:-default}`` at its default."""
    text = (DOCKER / name).read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return loaded


def manifests() -> dict[str, dict[str, Any]]:
    """What docker/kubernetes/rayjob.yaml holds, by kind."""
    text = (DOCKER / "kubernetes" / "rayjob.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def gpu_job() -> dict[str, Any]:
    """The RayJob that docker/kubernetes-gpu makes of the one in docker/kubernetes."""
    job = manifests()["RayJob"]
    overlay = yaml.safe_load((DOCKER / "kubernetes-gpu" / "kustomization.yaml").read_text())
    (patch,) = overlay["patches"]
    for change in yaml.safe_load(patch["patch"]):
        *parents, last = change["path"].removeprefix("/").split("/")
        place: Any = job
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        assert change["op"] == "add" or last in place, f"{change['path']} is not there to replace"
        # Anchors make equal parts one object in Python, and a patch must not change both.
        place[last] = copy.deepcopy(change["value"])
    return job
