"""What a finished run leaves in MLflow besides metrics: files, figures, the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.detectors.weights import file_digest, read_info
from d3etr.engine.run_folder import CONFIG_FILE, JOURNAL_FILE, SUMMARY_FILE, WEIGHTS_FILE
from d3etr.errors import UserError
from d3etr.tracking.model import log_student, register
from d3etr.tracking.open_run import OpenRun

FILES = (CONFIG_FILE, SUMMARY_FILE, JOURNAL_FILE)
DIGEST_LENGTH = 16


class Results:
    """What a run's folder gives to MLflow besides metrics, in steps that fail alone.

    Args:
        config: the run's configuration.
        run: in MLflow; its folder has the results.
    """

    def __init__(self, config: Config, run: OpenRun) -> None:
        self._config, self._run = config, run

    def steps(self) -> dict[str, Callable[[], None]]:
        """What is to be sent, by its name; files replace what was sent before."""
        present = [name for name in FILES if (self._run.folder / name).is_file()]
        steps: dict[str, Callable[[], None]] = {
            name: partial(self._send_file, name, None) for name in present
        }
        if SUMMARY_FILE not in present:  # the run did not get to its end
            return steps
        return steps | {
            name: partial(self._take, name, step)
            for name, step in self._steps_of_weights().items()
            if name in self._run.state.lacking
        }

    def _steps_of_weights(self) -> dict[str, Callable[[], None]]:
        """Those that are taken once for a weights file; the state knows which are left."""
        steps: dict[str, Callable[[], None]] = {
            "weights": partial(self._send_file, WEIGHTS_FILE, "weights"),
            "data set": self._name_data,
            "figures": self._draw,
            "model": self._log_model,
            "registered model": self._register,
        }
        if not self._config.tracking.figures:
            del steps["figures"]
        if self._config.tracking.register_as is None:
            del steps["registered model"]
        weights = self._run.folder / WEIGHTS_FILE
        digest = file_digest(weights) if weights.is_file() else ""
        if not digest or self._run.state.results_digest != digest:
            self._run.remember(results_digest=digest, lacking=tuple(steps), model_uri=None)
        return steps

    def _take(self, name: str, step: Callable[[], None]) -> None:
        step()
        self._run.remember(lacking=tuple(left for left in self._run.state.lacking if left != name))

    def _send_file(self, name: str, folder: str | None) -> None:
        self._run.client.log_artifact(self._run.run_id, str(self._run.folder / name), folder)

    def _evaluation(self) -> dict[str, Any]:
        return dict(read_info(self._run.folder / WEIGHTS_FILE).evaluation or {})

    def _data_digest(self) -> str:
        return str(self._evaluation().get("data_digest", ""))[:DIGEST_LENGTH]

    def _name_data(self) -> None:
        digest = self._data_digest()
        if digest:
            self._run.client.set_tag(self._run.run_id, "data_digest", digest)
            data = _dataset(self._config, digest)
            self._run.client.log_inputs(self._run.run_id, datasets=[data])

    def _draw(self) -> None:
        # matplotlib and the detectors take seconds to import: only who draws pays.
        from d3etr.tracking.figures.collect import draw_figures

        for path in draw_figures(self._config, self._run.folder, self._run.folder / "figures"):
            self._run.client.log_artifact(self._run.run_id, str(path), "figures")

    def _log_model(self) -> None:
        step = max(0, self._run.state.sent_step)
        name, weights = self._config.run.role, self._run.folder / WEIGHTS_FILE
        uri = log_student(weights, self._run.run_id, self._run.uri, name=name, step=step)
        self._run.remember(model_uri=uri)

    def _register(self) -> None:
        name, model = self._config.tracking.register_as, self._run.state.model_uri
        if name is None or model is None:
            raise UserError("the model itself is missing")
        quality = self._evaluation().get("mAP")
        chosen = (model, self._run.run_id, quality, self._data_digest())
        self._run.remember(model_uri=register(self._run.uri, name, *chosen))


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
