"""The student as an MLflow model: logged with its run, registered on request.

Other code loads it with ``mlflow.pyfunc.load_model("models:/NAME@champion")``; ``mlflow models
serve`` serves it. Loading executes the code stored with the model: trust the registry.
"""

from __future__ import annotations

import re
import shutil
import threading
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array

import d3etr
from d3etr.config.backbones import TIMM
from d3etr.detectors.weights import DEFAULT_THRESHOLD, read_info
from d3etr.logs import get_logger
from d3etr.tracking.model_card import LATENCY, MACHINE, ModelFacts
from d3etr.tracking.sender import ONCE

logger = get_logger(__name__)
_uri_lock = threading.Lock()

NEWEST_ALIAS = "newest"
CHAMPION_ALIAS = "champion"
CODE_ARCHIVE = "d3etr.zip"
METRICS_PER_REQUEST = 1000
_FORBIDDEN = re.compile(r"""[/:.%"']""")
DIGITS = 4
"""Of a version's mAP: champions are compared by these."""
REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
)
"""What the model needs where it is served, over timm's backbones timm too; neither Ray nor
pycocotools."""


def signature(threshold: float = DEFAULT_THRESHOLD) -> ModelSignature:
    """Rows of image and threshold in; boxes, scores, labels, names and error out.

    Both columns are of any type: MLflow would refuse all rows for one of another type.

    Args:
        threshold: lowest score of a detection where a request has none.
    """
    inputs = Schema([ColSpec(AnyType(), "image"), ColSpec(AnyType(), "threshold", False)])
    outputs = Schema(
        [
            ColSpec(Array(Array(DataType.double)), "boxes_xyxy"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(Array(DataType.long), "labels"),
            ColSpec(Array(DataType.string), "names"),
            ColSpec(DataType.string, "error", required=False),
        ]
    )
    default = ParamSpec("threshold", DataType.double, threshold)
    return ModelSignature(inputs=inputs, outputs=outputs, params=ParamSchema([default]))


def log_student(
    client: MlflowClient,
    weights: Path,
    run_id: str,
    *,
    name: str,
    step: int,
    measured: Sequence[Metric],
) -> str:
    """Log a weights file as a model of a run.

    Args:
        client: of MLflow.
        weights: a d3etr weights file.
        run_id: the MLflow run that made it.
        name: what pages call it; what MLflow does not take of it becomes ``_``.
        step: optimiser step of the weights.
        measured: at that step; the model has these and what the run has once.

    Returns:
        Address of the model for ``mlflow.pyfunc.load_model``.
    """
    run = client.get_run(run_id)
    # By hand: MLflow's own way asks for every metric of the run alone.
    name = _FORBIDDEN.sub("_", name)
    model = client.create_logged_model(run.info.experiment_id, name, source_run_id=run_id)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    once = [
        each
        for each in run.data.to_proto().metrics
        if each.step == ONCE and not each.key.startswith("teacher/")
    ]
    metrics = [
        Metric(each.key, each.value, each.timestamp, each.step, model_id=model.model_id)
        for each in (*once, *measured)
    ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])
    with TemporaryDirectory() as folder:
        content = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            model_id=model.model_id,
            run_id=run_id,
        )
        _save(Path(folder), weights, content)
        client.log_model_artifacts(model.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_uri)


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        address: ``models:/NAME/VERSION``.
        standing: a sentence: whether it is the champion, and why not.
    """

    address: str
    standing: str


def register(uri: str, name: str, model_uri: str, run_id: str, facts: ModelFacts) -> Registered:
    """Register a logged model, once.

    Alias ``newest`` then points at it, and alias ``champion`` if it beats the registered student
    of the same data that has it. Its description and tags say what ``facts`` do.

    Args:
        uri: MLflow's address.
        name: of the registered model.
        model_uri: the logged model, ``models:/m-...``.
        run_id: the run that made it.
        facts: about it.
    """
    client = MlflowClient(tracking_uri=uri)
    with default_uri(uri):
        version = _register(client, name, model_uri, run_id)
    client.update_model_version(name, version, facts.card(_latency(client, run_id)))
    for key, value in facts.tags().items():
        client.set_model_version_tag(name, version, key, value)
    standing = _set_aliases(client, name, version, facts.mAP, facts.data_digest)
    return Registered(f"models:/{name}/{version}", standing)


def _latency(client: MlflowClient, run_id: str) -> str | None:
    """What ``d3etr compare --latency FILE --track`` has sent to a run."""
    data = client.get_run(run_id).data
    if LATENCY not in data.metrics:
        return None
    return f"{data.metrics[LATENCY]:.4g} ms ({data.tags.get(MACHINE, 'machine not known')})"


def logged_model(client: MlflowClient, address: str, run_id: str) -> str:
    """The logged model, ``models:/m-...``, that a version in the registry was made of.

    Args:
        client: of MLflow.
        address: of the logged model itself; in folders of earlier versions, of the version, which
            may have been deleted since or renamed.
        run_id: the run that made it.
    """
    parts = address.removeprefix("models:/").rsplit("/", 1)
    if len(parts) == 1:
        return address
    try:
        return str(client.get_model_version(*parts).source)
    except MlflowException as error:
        made = client.get_run(run_id).outputs.model_outputs
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" or not made:
            raise
        return f"models:/{max(made, key=lambda model: model.step).model_id}"


def _save(folder: Path, weights: Path, content: Model) -> None:
    """Write the model below ``folder``: few files, since a slow server takes one at a time."""
    archive, info = folder / CODE_ARCHIVE, read_info(weights)
    _pack(Path(d3etr.__file__).parent, archive)
    with warnings.catch_warnings(record=True) as caught:
        mlflow.pyfunc.save_model(
            str(folder / "model"),
            mlflow_model=content,
            python_model=str(Path(__file__).with_name("served_student.py")),
            artifacts={"weights": str(weights)},
            signature=signature(info.threshold),
            code_paths=[str(archive)],
            pip_requirements=_pinned(info.detector.backbone.name),
        )
    for warning in caught:  # type hints and an input example, which the signature makes needless
        logger.debug("MLflow: %s", warning.message)
    for left in Path(folder, "model").rglob("__pycache__"):
        shutil.rmtree(left)


def _pack(package: Path, archive: Path) -> None:
    """The package as one file, which Python imports as it is; without recipes and weights."""
    left_out = {"__pycache__", "shipped"}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(package.rglob("*")):
            if file.is_file() and left_out.isdisjoint(file.relative_to(package).parts):
                packed.write(file, file.relative_to(package.parent))


def _register(client: MlflowClient, name: str, model_uri: str, run_id: str) -> str:
    """Version that the model got; the one that it has where it was registered before."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.source == model_uri:
            return str(known.version)
    version = client.create_model_version(
        name, source=model_uri, run_id=run_id, model_id=model_uri.rpartition("/")[2]
    )
    return str(version.version)


def _set_aliases(
    client: MlflowClient, name: str, version: str, quality: float | None, data_digest: str
) -> str:
    """Move the aliases where they belong; a sentence about the version's place."""
    client.set_registered_model_alias(name, NEWEST_ALIAS, version)
    if quality is None:
        return f"version {version} was not measured: alias '{CHAMPION_ALIAS}' is left where it is"
    client.set_model_version_tag(name, version, "data_digest", data_digest)
    client.set_model_version_tag(name, version, "mAP", f"{quality:.{DIGITS}f}")
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION_ALIAS)
        reigning, compared = int(champion.version), champion.tags.get("data_digest", data_digest)
    except MlflowException:  # the first one
        reigning, compared = 0, data_digest
    if compared != data_digest:
        text = (
            f"version {version} was measured on other data than version {reigning} with alias "
            f"'{CHAMPION_ALIAS}', which is left where it is"
        )
        logger.warning("model %s: %s", name, text)
        return text
    # All that came after the champion: another run may end at the same moment.
    rivals = [
        found
        for found in client.search_model_versions(f"name = '{name}'")
        if int(found.version) >= min(reigning, int(version))
        and found.tags.get("data_digest") == data_digest
    ]

    def rank(one: ModelVersion) -> tuple[float, bool, int]:
        """Of equal ones the champion, else the first."""
        number = int(one.version)
        return float(one.tags.get("mAP", -1)), number == reigning, -number

    best = max(rivals, key=rank)
    client.set_registered_model_alias(name, CHAMPION_ALIAS, str(best.version))
    if str(best.version) == version:
        return f"version {version} is the {CHAMPION_ALIAS}, with mAP {quality:.{DIGITS}f}"
    return (
        f"the {CHAMPION_ALIAS} is version {best.version}, with mAP {best.tags.get('mAP')}; version "
        f"{version} has {quality:.{DIGITS}f} on the same data"
    )


@contextmanager
def default_uri(uri: str) -> Iterator[None]:
    """Models are logged to MLflow's process-wide address only: lend it, then put it back."""
    with _uri_lock:
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def _pinned(backbone: str) -> list[str]:
    """Requirements as installed here; a build tag (+cpu) is this machine's own."""
    names = (*REQUIREMENTS, "timm") if backbone.startswith(TIMM) else REQUIREMENTS
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]
