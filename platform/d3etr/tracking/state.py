"""What a run folder remembers about its MLflow run: ``mlflow_run.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import write_text


class RunState(BaseModel):
    """Which MLflow run a folder belongs to and what was sent to it."""

    model_config = ConfigDict(extra="forbid")

    tracking_uri: str
    """Without credentials; another address means another run."""
    experiment_id: str
    run_id: str
    sent_step: int = -1
    """Last optimiser step whose metrics MLflow has confirmed; -1 before any."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    """How the run ended, also when MLflow does not know it."""
    stopped_early: bool = False
    """A sweep ended the run before its last step, on purpose."""
    complete: bool = False
    """MLflow has every metric and artifact of a run that ended."""
    results_digest: str | None = None
    """sha256 of the weights file whose results are sent, so that they are sent once."""
    lacking: tuple[str, ...] = ()
    """Of these results, what MLflow does not have yet."""
    model_uri: str | None = None
    """The logged model, ``models:/m-...``; of earlier versions, where it was registered."""
    registered_as: str | None = None
    """``models:/NAME/VERSION`` that ``tracking.register_as`` made of it."""

    def is_registered(self, name: str | None) -> bool:
        """Whether ``tracking.register_as: name`` leaves nothing to do."""
        made = (self.registered_as or "", self.model_uri or "")
        return name is None or any(each.startswith(f"models:/{name}/") for each in made)


def read_state(run_dir: Path) -> RunState | None:
    """The folder's MLflow run, None if it has none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = RunFolder(run_dir).mlflow_run
    try:
        return RunState.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged, so it is unknown which MLflow run this folder belongs to. "
            "Delete the file to have everything sent to a new MLflow run."
        ) from error


def write_state(run_dir: Path, state: RunState) -> None:
    """Write the file whole or not at all."""
    write_text(RunFolder(run_dir).mlflow_run, state.model_dump_json(indent=2) + "\n")
