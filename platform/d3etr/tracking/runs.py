"""One MLflow run per run folder: opened, fed while training runs, finished, replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from PIL import Image

from d3etr.config.load import load_config
from d3etr.config.location import Url
from d3etr.config.overrides import as_overrides
from d3etr.config.tree import Config
from d3etr.data.file_labels import LABELS_KEY
from d3etr.data.splits import UNLABELLED
from d3etr.detectors.weights import file_digest, read_info
from d3etr.engine.journal import read_journal
from d3etr.engine.provenance import INPUTS_KEY, data_key
from d3etr.engine.run_folder import RunFolder
from d3etr.engine.watch import FINDING
from d3etr.errors import RunFailedError, UserError
from d3etr.files import read_json
from d3etr.logs import get_logger
from d3etr.progress import OnProgress, no_progress
from d3etr.text import bare_url
from d3etr.tracking.description import params, run_name, tags
from d3etr.tracking.model import Registered, log_student, logged_model, register
from d3etr.tracking.model_card import CARD_FILE, DIGEST_LENGTH, data_name, model_facts
from d3etr.tracking.note import KEY, opening_note, place_of, tell_result
from d3etr.tracking.open_run import OpenRun, Status, Steps, refusals
from d3etr.tracking.sender import Sender, metrics_of
from d3etr.tracking.server import (
    UPLOAD_TIMEOUT_SECONDS,
    connect,
    first_line,
    patience,
    tracking_uri,
)
from d3etr.tracking.state import RunState, read_state

logger = get_logger(__name__)


def open_tracker(
    config: Config,
    run_dir: Path,
    *,
    parent_run: str | None = None,
    name: str | None = None,
    ended: bool = False,
) -> Tracker:
    """Start the folder's MLflow run, or resume it if the folder has one.

    Args:
        config: the run's configuration.
        run_dir: its folder, which must exist.
        parent_run: id of the MLflow run that this one is listed under (a sweep's).
        name: what MLflow's table calls it; by default after the configuration.
        ended: nothing will be trained: a run that MLflow knows keeps the status that it has.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """
    folder = RunFolder(run_dir)
    run = OpenRun(
        config,
        run_dir,
        name or run_name(config),
        lambda: _first_tags(config, run_dir, parent_run),
        params(config),
        begun=_begun_and_ended(run_dir)[0],
        ended=ended or all(file.is_file() for file in (folder.summary, folder.weights)),
    )
    with run.refusals():  # the server may go away between two requests
        return Tracker(config, run)


def replay(run_dir: Path, report: Callable[[str], None] = logger.info) -> str | None:
    """Send what MLflow does not have yet of a run that ended; safe to repeat.

    Args:
        run_dir: a run folder with ``config.yaml`` and ``journal.jsonl``.
        report: takes a sentence about what was done.

    Returns:
        None when MLflow has everything, else what is missing and why, in one sentence.

    Raises:
        UserError: MLflow does not answer, the folder holds no run, or it was tracked elsewhere.
    """
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    state = read_state(run_dir)
    status: Status = "FINISHED" if folder.summary.is_file() else "KILLED"
    if state is not None and state.status != "RUNNING":
        status = state.status
    config = _where_tracked(load_config(folder.config, ()), run_dir, state)
    tracker = open_tracker(config, run_dir, ended=True)
    missing = tracker.finish(status)
    if missing is None:
        report(f"MLflow run {tracker.run_id} has everything of {run_dir}")
    return missing


def _where_tracked(config: Config, run_dir: Path, state: RunState | None) -> Config:
    """The run's configuration with the address of the MLflow that has the run.

    Raises:
        UserError: neither the configuration nor the environment has it.
    """
    if state is None:
        return config
    for uri in (tracking_uri(config), os.environ.get("MLFLOW_TRACKING_URI")):
        if uri and bare_url(uri) == state.tracking_uri:
            tracking = config.tracking.model_copy(update={"uri": uri})
            return config.model_copy(update={"tracking": tracking})
    raise UserError(
        f"{run_dir} was tracked at {state.tracking_uri}, but would now be sent to a new run at "
        f"{bare_url(tracking_uri(config))}: set MLFLOW_TRACKING_URI to the former, or remove "
        f"{RunFolder(run_dir).mlflow_run} for a new run"
    )


def register_run(run_dir: Path, name: str) -> Registered:
    """Register a finished run's student; what MLflow lacks of the run is sent first.

    Args:
        run_dir: its folder.
        name: of the registered model, which is made where there is none.

    Raises:
        UserError: the run is not finished, the name is none, or MLflow does not answer or refuses.
        RunFailedError: MLflow did not take everything.
    """
    if RunFolder(run_dir).result() is None:
        raise UserError(f"{run_dir} is not finished: only a trained student can be registered")
    config = load_config(RunFolder(run_dir).config, as_overrides({"tracking.register_as": name}))
    missing = replay(run_dir)
    state = read_state(run_dir)
    if missing is not None or state is None or state.model_uri is None:
        raise RunFailedError(missing or f"MLflow has no model of {run_dir}")
    uri = tracking_uri(_where_tracked(config, run_dir, state))
    with refusals(uri, f"model '{name}'"), patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
        source = logged_model(connect(uri), state.model_uri, state.run_id)
        return register(uri, name, source, state.run_id, model_facts(run_dir))


class Tracker:
    """Follows a run's journal into MLflow. ``finish`` never raises: training comes first."""

    def __init__(self, config: Config, run: OpenRun) -> None:
        self._config, self._run, self._folder = config, run, RunFolder(run.folder)
        self._sender = Sender(
            run.client,
            run.run_id,
            self._folder.journal,
            lambda step: run.remember(sent_step=step),
        )

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self._run.run_id

    def mark_as_stopped_early(self) -> None:
        """Before ``finish``: a sweep ended the run on purpose, which is no failure."""
        self._run.remember(stopped_early=True)

    def finish(self, status: Status, on_progress: OnProgress = no_progress) -> str | None:
        """Send the rest of the journal, close the run, then send the results.

        The status never waits for the results: until all are there, tag ``missing`` names those
        that are not.

        Args:
            status: how the run ended.
            on_progress: takes a line about what is being sent.

        Returns:
            None when MLflow has everything, else one sentence: what is missing and how to send
            it later.
        """
        run = self._run
        run.remember(status=status)
        unsent: dict[str, str] = {}
        failure = self._sender.close()
        if failure is not None:
            unsent[f"metrics after step {max(0, run.state.sent_step)}"] = first_line(failure)
        lacks = run.close(
            status,
            self._results,
            ended=_begun_and_ended(run.folder)[1],
            missing=unsent,
            on_progress=on_progress,
        )
        if lacks is None:
            run.remember(complete=True)
            return None
        return (
            f"MLflow at {run.place} lacks of {run.folder.name}: {lacks}. Everything is "
            f"kept in {run.folder}: send it with 'python -m d3etr.tracking {run.folder}'"
        )

    def _results(self) -> Steps:
        """What is to be sent, by its name; files replace what was sent before."""
        folder = self._folder
        files = [file for file in (folder.config, folder.summary, folder.journal) if file.is_file()]
        steps: dict[str, Callable[[], None]] = {
            file.name: partial(self._send_file, file) for file in files
        }
        steps["findings"] = self._tag_findings
        steps["description"] = self._describe
        if not folder.summary.is_file():  # the run did not get to its end
            return steps
        once = self._results_of_weights()
        digest = file_digest(folder.weights) if folder.weights.is_file() else ""
        if not digest or self._run.state.results_digest != digest:
            self._run.remember(
                results_digest=digest, lacking=tuple(once), model_uri=None, registered_as=None
            )
        lacking = self._run.state.lacking
        if not self._run.state.is_registered(self._config.tracking.register_as):
            lacking += ("registered model",)  # also of a name that is asked for later
        return steps | {
            name: partial(self._send_once, name, step)
            for name, step in once.items()
            if name in lacking
        }

    def _results_of_weights(self) -> dict[str, Callable[[], None]]:
        """Those that are sent once for a weights file; the state knows which are left."""
        steps: dict[str, Callable[[], None]] = {
            "weights": partial(self._send_file, self._folder.weights, "weights"),
            "data set": self._name_data,
        }
        if self._config.tracking.figures:
            steps["figures"] = self._draw
        steps["model card"] = self._send_card
        steps["model"] = self._log_model
        if self._config.tracking.register_as is not None:
            steps["registered model"] = partial(self._register, self._config.tracking.register_as)
        return steps

    def _send_once(self, name: str, step: Callable[[], None]) -> None:
        step()
        self._run.remember(lacking=tuple(left for left in self._run.state.lacking if left != name))

    def _tag_findings(self) -> None:
        """Tags ``not_learning``: what speaks against the run, and ``stopped_early``: where."""
        records = read_journal(self._folder.journal)
        kinds = dict.fromkeys(str(record[FINDING]) for record in records if FINDING in record)
        if kinds:
            self._run.client.set_tag(self.run_id, "not_learning", ", ".join(kinds))
        if self._run.state.stopped_early:
            self._run.client.set_tag(self.run_id, "stopped_early", place_of(records))

    def _describe(self) -> None:
        run = self._run
        tell_result(
            run.client,
            run.run_id,
            self._config,
            run.folder,
            run.state.status,
            pruned=run.state.stopped_early,
        )

    def _send_file(self, file: Path, artifact_path: str | None = None) -> None:
        self._run.client.log_artifact(self.run_id, str(file), artifact_path)

    def _evaluation(self) -> dict[str, Any]:
        return dict(read_info(self._folder.weights).evaluation or {})

    def _data_digest(self) -> str:
        return str(self._evaluation().get("data_digest", ""))[:DIGEST_LENGTH]

    def _name_data(self) -> None:
        digest = self._data_digest()
        if digest:
            self._run.client.set_tag(self.run_id, "data_digest", digest)
            data = _dataset(self._config, digest)
            self._run.client.log_inputs(self.run_id, datasets=[data])
        for name, value in _unlabelled(read_json(self._folder.summary)).items():
            self._run.client.log_param(self.run_id, name, value)

    def _draw(self) -> None:
        # matplotlib and the detectors take seconds to import: only who draws pays.
        from d3etr.tracking.figures.collect import draw_figures

        run, step = self._run, max(0, self._run.state.sent_step)
        for path in draw_figures(self._config, run.folder, self._folder.figures):
            self._send_file(path, "figures")
            with Image.open(path) as image:  # for MLflow's grid of images, beside the charts
                run.client.log_image(run.run_id, image, key=f"figures/{path.stem}", step=step)

    def _send_card(self) -> None:
        card = model_facts(self._run.folder).card()
        self._run.client.log_text(self.run_id, card, CARD_FILE)

    def _log_model(self) -> None:
        run, weights = self._run, self._folder.weights
        name = f"{run_name(self._config)} · {self._config.student.detector.name}"
        # The weights may be of an earlier evaluation than the run's last metrics.
        summary = read_json(self._folder.summary)
        step = int(summary.get("kept_step", max(0, run.state.sent_step)))
        measured = [
            metric
            for record in read_journal(self._folder.journal)
            if record["step"] == step and record["kind"] in ("step", "evaluation")
            for metric in metrics_of(record)
        ]
        uri = log_student(run.client, weights, run.run_id, name=name, step=step, measured=measured)
        run.remember(model_uri=uri)

    def _register(self, name: str) -> None:
        run = self._run
        if run.state.model_uri is None:
            raise UserError("the model itself is missing")
        facts = model_facts(run.folder)
        found = register(run.uri, name, run.state.model_uri, run.run_id, facts)
        run.remember(registered_as=found.address)


def _first_tags(config: Config, run_dir: Path, parent_run: str | None) -> dict[str, str]:
    parent = {"mlflow.parentRunId": parent_run} if parent_run else {}
    return tags(config, run_dir) | {KEY: opening_note(config, run_dir)} | parent


def _begun_and_ended(run_dir: Path) -> tuple[int | None, int | None]:
    """In milliseconds since 1970, so that a run that is sent late shows its own times."""
    times = [
        record["time"] for record in read_journal(RunFolder(run_dir).journal) if "time" in record
    ]
    if not times:
        return None, None
    # The clock may have been set back: a run does not end before it began.
    return int(1000 * times[0]), int(1000 * max(times[0], times[-1]))


def _unlabelled(summary: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a run on images without labels: how many, and digests of what they are."""
    if "unlabelled_images" not in summary:
        return {}
    inputs, count = summary[INPUTS_KEY], str(int(summary["unlabelled_images"]))
    digests = {"unlabelled_digest": data_key(UNLABELLED), "unlabelled_labels_digest": LABELS_KEY}
    return {"unlabelled_images": count} | {
        name: inputs[key][:DIGEST_LENGTH] for name, key in digests.items() if key in inputs
    }


def _dataset(config: Config, digest: str) -> DatasetInput:
    """What the run was measured on, as MLflow's tables show it."""
    kind, source = "local", "made by d3etr"
    if config.data.validation is not None:
        place = config.data.validation.annotations
        source = place.shown if isinstance(place, Url) else str(place)
        kind = place.protocol if isinstance(place, Url) else kind
    dataset = Dataset(
        data_name(config), digest, source_type=kind, source=json.dumps({"uri": source})
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "validation")])
