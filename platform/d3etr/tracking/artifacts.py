"""What a finished run leaves in MLflow besides metrics: files, figures, the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient

from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.detectors.weights import file_digest, read_info
from d3etr.errors import UserError
from d3etr.tracking.model import log_student, register
from d3etr.tracking.state import RunState, write_state

FILES = ("config.yaml", "summary.json", "journal.jsonl")
WEIGHTS = "weights.safetensors"
DIGEST_LENGTH = 16


class Results:
    """What a run's folder gives to MLflow besides metrics, in steps that fail alone.

    Args:
        client: of the MLflow at ``uri``.
        config: the run's configuration.
        run_dir: its folder.
        uri: MLflow's address.
        state: which MLflow run it is and what of it was sent.
    """

    def __init__(
        self, client: MlflowClient, config: Config, run_dir: Path, uri: str, state: RunState
    ) -> None:
        self._client, self._config, self._run_dir = client, config, run_dir
        self._uri, self.state = uri, state

    def steps(self) -> dict[str, Callable[[], None]]:
        """What is to be sent, by its name; files replace what was sent before."""
        present = [name for name in FILES if (self._run_dir / name).is_file()]
        steps: dict[str, Callable[[], None]] = {
            name: partial(self._send_file, name, None) for name in present
        }
        if "summary.json" not in present:  # the run did not get to its end
            return steps
        return steps | {
            name: partial(self._take, name, step)
            for name, step in self._steps_of_weights().items()
            if name in self.state.lacking
        }

    def _steps_of_weights(self) -> dict[str, Callable[[], None]]:
        """Those that are taken once for a weights file; the state knows which are left."""
        steps: dict[str, Callable[[], None]] = {
            "weights": partial(self._send_file, WEIGHTS, "weights"),
            "data set": self._name_data,
            "figures": self._draw,
            "model": self._log_model,
            "registered model": self._register,
        }
        if not self._config.tracking.figures:
            del steps["figures"]
        if self._config.tracking.register_as is None:
            del steps["registered model"]
        weights = self._run_dir / WEIGHTS
        digest = file_digest(weights) if weights.is_file() else ""
        if not digest or self.state.results_digest != digest:
            fresh = {"results_digest": digest, "lacking": tuple(steps), "model_uri": None}
            self._remember(**fresh)
        return steps

    def _take(self, name: str, step: Callable[[], None]) -> None:
        step()
        self._remember(lacking=tuple(left for left in self.state.lacking if left != name))

    def _remember(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        write_state(self._run_dir, self.state)

    def _send_file(self, name: str, folder: str | None) -> None:
        self._client.log_artifact(self.state.run_id, str(self._run_dir / name), folder)

    def _evaluation(self) -> dict[str, Any]:
        return dict(read_info(self._run_dir / WEIGHTS).evaluation or {})

    def _data_digest(self) -> str:
        return str(self._evaluation().get("data_digest", ""))[:DIGEST_LENGTH]

    def _name_data(self) -> None:
        digest = self._data_digest()
        if digest:
            self._client.set_tag(self.state.run_id, "data_digest", digest)
            data = _dataset(self._config, digest)
            self._client.log_inputs(self.state.run_id, datasets=[data])

    def _draw(self) -> None:
        # matplotlib and the detectors take seconds to import: only who draws pays.
        from d3etr.tracking.figures.collect import draw_figures

        for path in draw_figures(self._config, self._run_dir, self._run_dir / "figures"):
            self._client.log_artifact(self.state.run_id, str(path), "figures")

    def _log_model(self) -> None:
        step = max(0, self.state.sent_step)
        name, weights = self._config.run.role, self._run_dir / WEIGHTS
        uri = log_student(weights, self.state.run_id, self._uri, name=name, step=step)
        self._remember(model_uri=uri)

    def _register(self) -> None:
        name, model = self._config.tracking.register_as, self.state.model_uri
        if name is None or model is None:
            raise UserError("the model itself is missing")
        quality = self._evaluation().get("mAP")
        run, digest = self.state.run_id, self._data_digest()
        self._remember(model_uri=register(self._uri, name, model, run, quality, digest))


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
