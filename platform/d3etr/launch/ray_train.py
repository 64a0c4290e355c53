"""Train under Ray Train: one to many workers on one to many machines.

Ray starts the workers and notices lost ones. Checkpoints, metrics and their history are in the
run's folder and not Ray's affair, so that a run can change launchers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.control_files import ControlFiles
from d3etr.launch.driver import Launch
from d3etr.launch.elastic import train_elastically
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.ray_failures import translate
from d3etr.launch.ray_group import Group
from d3etr.launch.resources import demand_of, describe, ensure_room
from d3etr.launch.task import Task, train
from d3etr.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RayLauncher:
    """Trains with Ray Train.

    Attributes:
        task: what each worker runs.
    """

    task: Task = train

    def __call__(self, launch: Launch) -> Callable[[], None]:
        """Reach a cluster that has room, and return what trains there until the end.

        Raises:
            UserError: the cluster has no room, or cannot be reached.
        """
        cluster = launch.config.cluster
        launch.later.enter_context(connected(cluster, launch.on_progress))
        nodes = cluster_nodes()
        demand = demand_of(cluster, nodes)
        ensure_room(demand, nodes)
        storage = RunFolder(launch.run_dir).ray / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        storage.mkdir(parents=True)
        group = Group(launch, self.task, demand, storage, ControlFiles(storage))
        if demand.elastic:
            return partial(train_elastically, group)
        return partial(_train, group, describe(nodes))


def _train(group: Group, nodes: str) -> None:
    """Train with as many workers as asked for; Ray starts them again where some are lost.

    Raises:
        UserError: a worker met a mistake.
        RunFailedError: workers kept failing.
    """
    cluster = group.launch.config.cluster
    group.launch.on_progress(f"starting {group.demand} ({nodes})")
    try:
        group.fit(group.demand.workers, cluster.maximum_failures, "workers")
    except (UserError, RunFailedError):
        raise
    except Exception as error:
        raise translate(error, cluster, group.demand, group.control) from error
