"""A sweep in MLflow: a parent run, above the runs of its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow.entities import Metric

from d3etr.config.tree import Config
from d3etr.engine.journal import KEPT_MAP
from d3etr.logs import get_logger
from d3etr.tracking.address import BEST_FIRST, how_to_open
from d3etr.tracking.charts import charted_page
from d3etr.tracking.model import register
from d3etr.tracking.model_card import model_facts
from d3etr.tracking.open_run import OpenRun, Status, settled
from d3etr.tracking.sender import ONCE, metric_name, readable
from d3etr.tracking.server import UPLOAD_TIMEOUT_SECONDS, patience
from d3etr.tracking.state import read_state

logger = get_logger(__name__)

TAGS = {
    "role": "sweep",
    "title": "sweep",
    "mlflow.source.name": "sweeps/run.py",
    "mlflow.source.type": "LOCAL",
}
DEFAULT_MODEL = "d3etr-student"
"""The best student is registered under this name, where ``tracking.register_as`` gives none."""


@dataclass(frozen=True)
class Swept:
    """A finished trial, as it is shown in MLflow.

    Attributes:
        title: its values, as tables show them.
        mAP: on the validation split, in [0, 1].
        run_dir: its folder.
    """

    title: str
    mAP: float
    run_dir: Path


class SweepRun:
    """The parent run of a sweep; made, or resumed after a restart.

    Args:
        config: a trial's; has MLflow's address.
        folder: of the sweep.
        title: one line: what is swept.
        params: what the sweep is.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """

    def __init__(self, config: Config, folder: Path, title: str, params: Mapping[str, str]) -> None:
        self._config, self._folder, self._title = config, folder, title
        self._run = OpenRun(config, folder, f"sweep · {folder.name}", TAGS.copy, params)
        self._client, self.run_id = self._run.client, self._run.run_id
        trials = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        with self._run.refusals():
            experiment = self._run.state.experiment_id
            self._page = charted_page(self._client, experiment, trials, BEST_FIRST)
            self._describe()

    def how_to_open(self) -> list[str]:
        """What a person types and opens to see the trials, best first."""
        return how_to_open(self._run.uri, self._page)

    def finish(
        self,
        status: Status,
        trials: Sequence[Swept],
        files: Sequence[Path],
        importance: Mapping[str, float] | None = None,
    ) -> str | None:
        """Close the sweep's run and log what it found; a failure is returned, not raised.

        Args:
            status: how it ended.
            trials: the finished ones.
            files: table, results, best recipe.
            importance: name of a key -> its share of the differences in mAP.

        Returns:
            None when MLflow has everything, else a sentence about what is missing.
        """
        metrics = {f"importance/{metric_name(key)}": x for key, x in (importance or {}).items()}
        metrics |= {"trials/finished": float(len(trials))}
        if trials:
            best = max(trial.mAP for trial in trials)
            metrics |= {"val/mAP": best, KEPT_MAP: best}
        steps: dict[str, Callable[[], None]] = {"metrics": partial(self._log_metrics, metrics)}
        if trials:
            steps["note"] = partial(self._note_best, trials)
        steps |= {file.name: partial(self._send, file) for file in files if file.exists()}
        lacks = self._run.close(status, lambda: steps)
        if lacks is None:
            return None
        return (
            f"MLflow at {self._run.place} lacks of the sweep: {lacks}. "
            f"Everything is kept in {self._folder}: the same command sends it again"
        )

    def stopped(self, status: Status) -> None:
        """Record that the sweep stopped before its end; never raises."""
        try:
            with patience():
                self._client.set_terminated(self.run_id, status)
        except Exception as error:
            logger.warning("MLflow does not know that the sweep was stopped: %s", error)

    def register_best(self, best: Swept) -> None:
        """Register the best student's model; it becomes champion if it beats the one that is."""
        state = read_state(best.run_dir)
        if state is None or state.model_uri is None:
            logger.warning("the best student has no model in MLflow: nothing is registered")
            return
        if self._config.tracking.register_as is not None:
            return  # each trial was, when it ended
        with patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
            chosen = (state.model_uri, state.run_id, model_facts(best.run_dir))
            settled(partial(register, self._run.uri, DEFAULT_MODEL, *chosen))

    def _describe(self, found: str = "") -> None:
        """The parent's description, which leads to the page with the sweep's trials."""
        link = f"[The trials, best first, with charts]({self._page})"
        text = "\n\n".join(filter(None, [f"**{self._title}**", found, link]))
        self._client.set_tag(self.run_id, "mlflow.note.content", text)

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        now = self._client.get_run(self.run_id).info.start_time
        logged = [Metric(key, readable(value), now, ONCE) for key, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=logged)

    def _note_best(self, trials: Sequence[Swept]) -> None:
        best = max(trials, key=lambda trial: trial.mAP)
        self._client.set_tag(self.run_id, "best", best.title)
        found = f"Best of {len(trials)}: {best.title}, {100 * best.mAP:.1f} mAP on validation."
        self._describe(found)

    def _send(self, file: Path) -> None:
        self._client.log_artifact(self.run_id, str(file))
