"""Weights of registered students by their address: ``models:/NAME@ALIAS`` or ``models:/NAME/3``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.errors import UserError
from d3etr.text import bare_url
from d3etr.tracking.address import embedded_uri
from d3etr.tracking.model import default_uri
from d3etr.tracking.server import UPLOAD_TIMEOUT_SECONDS, connect, first_line, patience

_ADDRESS = re.compile(r"models:/([^/:@]+)(?:@([\w.-]+)|/([0-9]+))")
_SHOWN_MODELS = 10
"""So many names are listed where a model is not found."""


@contextmanager
def registered_weights(address: str) -> Iterator[Path]:
    """The weights file of a registered student, fetched for the block.

    Args:
        address: ``models:/NAME@champion``, or ``models:/NAME/VERSION``.

    Raises:
        UserError: no such address, model or weights, or MLflow does not answer.
    """
    name, version = _named_version(address)
    uri = registry_uri()
    with TemporaryDirectory(prefix="d3etr-model-") as folder:
        try:
            with default_uri(uri), patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
                content = mlflow.artifacts.download_artifacts(
                    artifact_uri=f"models:/{name}/{version}/artifacts", dst_path=folder
                )
        except Exception as error:  # MLflow's, its artifact stores' and the network's
            raise UserError(
                f"{address}: its files cannot be fetched from MLflow at {bare_url(uri)}: "
                f"{first_line(error)}"
            ) from error
        found = sorted(Path(content).glob("*.safetensors"))
        if len(found) != 1:
            raise UserError(
                f"{address} holds {len(found)} weights files; expected a student that d3etr "
                "registered (tracking.register_as, or d3etr register), which has one"
            )
        yield found[0]


def pinned(address: str) -> str:
    """The same model by its version, which no alias moves on: ``models:/NAME/3``.

    Raises:
        UserError: as of ``registered_weights``.
    """
    name, version = _named_version(address)
    return f"models:/{name}/{version}"


def _named_version(address: str) -> tuple[str, str]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"found '{address}', expected models:/NAME@ALIAS, such as models:/student@champion, or "
            "models:/NAME/VERSION"
        )
    name, alias, version = match.groups()
    uri = registry_uri()
    client = connect(uri)
    try:
        with patience():
            found: ModelVersion = (
                client.get_model_version(name, version)
                if alias is None
                else client.get_model_version_by_alias(name, alias)
            )
    except MlflowException as error:
        raise UserError(
            f"{address}: MLflow at {bare_url(uri)} says: {first_line(error)}. "
            + _what_is_there(client, name)
        ) from error
    return name, str(found.version)


def _what_is_there(client: MlflowClient, name: str) -> str:
    with patience():
        models = {each.name: each.aliases for each in client.search_registered_models()}
    if name in models:
        return f"Its aliases are: {', '.join(sorted(models[name])) or 'none'}"
    names = sorted(models)[:_SHOWN_MODELS]
    if names:
        return f"Registered models are: {', '.join(names)}"
    return "No model is registered there: d3etr register RUN NAME"


def registry_uri() -> str:
    """Address of the MLflow whose models are meant: MLFLOW_TRACKING_URI, else ``runs/mlflow.db``.

    Raises:
        UserError: neither is there.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    if Path("runs", "mlflow.db").is_file():
        return embedded_uri(Path("runs"))
    raise UserError(
        "models:/ addresses a model of MLflow, and it is not known which MLflow: set "
        "MLFLOW_TRACKING_URI to its address, such as http://mlflow:5000 or "
        "sqlite:///runs/mlflow.db (there is no runs/mlflow.db here)"
    )
