"""What a finished run leaves in MLflow besides metrics: files, figures, the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient

from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.detectors.weights import file_digest, read_info
from d3etr.logs import get_logger
from d3etr.tracking.description import role
from d3etr.tracking.model import log_student
from d3etr.tracking.state import RunState

logger = get_logger(__name__)

FILES = ("config.yaml", "summary.json", "journal.jsonl")
WEIGHTS = "weights.safetensors"
DIGEST_LENGTH = 16


def log_results(
    client: MlflowClient, config: Config, run_dir: Path, state: RunState, uri: str
) -> RunState:
    """Log the run folder's results; files replace what was logged before under their name.

    Args:
        client: of the MLflow at ``uri``.
        config: the run's configuration.
        run_dir: its folder.
        state: which MLflow run it is and what of it was logged.
        uri: MLflow's address.

    Returns:
        The state with what was logged now.

    Raises:
        Exception: whatever MLflow raises; a figure that fails is a warning instead.
    """
    for name in FILES:
        if (run_dir / name).is_file():
            client.log_artifact(state.run_id, str(run_dir / name))
    summary = read_summary(run_dir)
    if summary is None:  # the run did not get to its end: no weights worth keeping
        return state
    weights = run_dir / WEIGHTS
    digest = file_digest(weights)
    if state.results_digest == digest:
        return state
    client.log_artifact(state.run_id, str(weights), "weights")
    evaluation = read_info(weights).evaluation or {}
    data_digest = str(evaluation.get("data_digest", ""))[:DIGEST_LENGTH]
    if data_digest:
        client.set_tag(state.run_id, "data_digest", data_digest)
        client.log_inputs(state.run_id, datasets=[_dataset(config, data_digest)])
    if config.tracking.figures:
        _log_figures(client, config, run_dir, state.run_id)
    model_uri = log_student(
        weights,
        state.run_id,
        uri,
        name=role(config),
        step=max(0, state.sent_step),
        register_as=config.tracking.register_as,
        quality=evaluation.get("mAP"),
        data_digest=data_digest,
    )
    return state.model_copy(update={"results_digest": digest, "model_uri": model_uri})


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run that reached its end, else None."""
    try:
        found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _dataset(config: Config, digest: str) -> DatasetInput:
    """What the run was measured on, as MLflow's tables show it."""
    name, kind, source = "digit-scenes", "local", "made by d3etr"
    if config.data.validation is not None:
        place = config.data.validation.annotations
        file, source = (place.path, place.shown) if isinstance(place, Url) else (place, str(place))
        name = f"{file.parent.name}/{file.stem}"
        kind = place.protocol if isinstance(place, Url) else kind
    dataset = Dataset(name, digest, source_type=kind, source=json.dumps({"uri": source}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "validation")])


def _log_figures(client: MlflowClient, config: Config, run_dir: Path, run_id: str) -> None:
    # matplotlib and the detectors take seconds to import: only who draws pays.
    from d3etr.tracking.figures.collect import draw_figures

    try:
        drawn = draw_figures(config, run_dir, run_dir / "figures")
    except Exception:  # a picture must never cost a finished run its other results
        logger.warning("the figures of %s could not be drawn", run_dir, exc_info=True)
        return
    for path in drawn:
        client.log_artifact(run_id, str(path), "figures")
