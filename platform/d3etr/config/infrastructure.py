"""Configuration of a run's name and place, the cluster under it and its tracking."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.data import FilePath


class RunConfig(Section):
    """Name, place and seed of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """The run's folder is this plus a digest of the configuration."""
    role: Literal["teacher", "student"] = "student"
    """What tables and figures call it; a teacher is not measured against students."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of every random number: weights, order and augmentation of images, dropout."""
    minutes: Annotated[float, Field(gt=0, le=MAXIMUM)] | None = None
    """How long the run is meant to take, wall time. It stops nothing: a run says from its first
    steps how far it is from that. ``d3etr init`` sets it; null compares with nothing."""
    output: FilePath = Path("runs")
    """Folder that holds runs; on a cluster, storage that all nodes share."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=MAXIMUM)] = 2
    """How many of the newest checkpoints stay."""
    checkpoint_every_epochs: Annotated[int, Field(ge=1, le=MAXIMUM)] = 1
    """Save a checkpoint after every so many epochs, and after the last."""
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=MAXIMUM)] | None = None
    """Save also within epochs, every so many optimiser steps; None does not."""
    hooks: tuple[str, ...] = ()
    """Names of hooks that installed packages bring (entry points ``d3etr.hooks``): code that is
    called at steps, evaluations and the end, and changes no result."""


class ClusterConfig(Section):
    """What the run asks of Ray."""

    address: str | None = None
    """Ray address (``auto``: the cluster on this machine); None joins the cluster that a submitted
    job is in (``RAY_ADDRESS``), else starts one here that ends with the run."""
    workers: Annotated[int, Field(ge=1, le=MAXIMUM)] = 1
    """Training processes; the images of a step are shared among them."""
    minimum_workers: Annotated[int, Field(ge=1, le=MAXIMUM)] | None = None
    """Elastic training: begin with what there is room for, and where a node goes train on with what
    is left, at least so many workers. None: always ``workers``."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=MAXIMUM)] | Literal["auto"] = "auto"
    """auto: 1 where the cluster has a GPU for every worker (or, elastic, for minimum_workers of
    them), else 0."""
    cpus_per_worker: Annotated[float, Field(gt=0, le=MAXIMUM)] = 1.0
    """Cores that Ray reserves for each worker."""
    threads_per_worker: Annotated[int, Field(ge=1, le=MAXIMUM)] | Literal["auto"] = "auto"
    """Threads of tensor operations; auto is OMP_NUM_THREADS, where that is set, else shares a
    node's cores among its workers."""
    maximum_failures: Annotated[int, Field(ge=0, le=MAXIMUM)] = 3
    """Lost workers or nodes that are survived."""
    start_timeout_seconds: Annotated[float, Field(gt=0, le=MAXIMUM)] = 60.0
    """How long to wait for a busy cluster to start the workers; tried maximum_failures + 1 times
    before the run gives up."""

    @model_validator(mode="after")
    def _minimum_is_one(self) -> Self:
        if self.minimum_workers is not None and self.minimum_workers > self.workers:
            raise ValueError(
                f"minimum_workers {self.minimum_workers} is above workers {self.workers}"
            )
        return self


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    """Record the run in MLflow."""
    uri: str | None = None
    """None: MLFLOW_TRACKING_URI, else an SQLite file in ``run.output``."""
    experiment: str = "d3etr"
    """MLflow's experiment that the run belongs to."""
    figures: bool = True
    """Draw figures and example images at the end of a run and record them."""
    system_metrics: bool = True
    """Record every 10 seconds how busy processors, memory and GPU of the first worker's machine
    are."""
    register_as: Annotated[str, Field(pattern=r"^[^/:]*[^/:\s][^/:]*$", max_length=256)] | None = (
        None
    )
    """Register the student as a model under this name."""
