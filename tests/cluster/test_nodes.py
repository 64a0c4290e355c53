"""Several hosts for real: a node is killed in the middle of a distilled run and comes back."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import why_no_namespaces
from mlflow.tracking import MlflowClient
from node_loss import (
    ELASTIC,
    END,
    LOST_AT,
    STEPS_PER_EPOCH,
    Loss,
    driver_command,
    lose_a_node,
    open_gate,
    write_recipe,
)
from ray_nodes import ROOT, START_SECONDS, RayNodes, ray_nodes

from d3etr.config.load import load_config
from d3etr.engine.journal import read_journal
from d3etr.launch.api import launch
from d3etr.launch.driver import RunResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Ray's sockets are in it, and their paths may have 107 characters: not pytest's long folder.
    folder = Path(tempfile.mkdtemp(prefix="d3etr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    with ray_nodes(folder) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    return write_recipe(folder)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> RunResult:
    """The same run, in one process."""
    return launch(load_config(recipe), launcher="local", quiet=True)


def losses(run_dir: Path) -> list[float]:
    records = [r for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "step"]
    return [record["metrics"]["train/loss"] for record in records]


def assert_nothing_lost(run: Loss, undisturbed: RunResult) -> None:
    """Every step once, every image once an epoch, the numbers of the undisturbed run."""
    assert [record["step"] for record in run.steps] == list(range(1, END + 1))
    assert losses(run.run_dir) == pytest.approx(losses(undisturbed.run_dir), rel=1e-4)
    summary = json.loads((run.run_dir / "summary.json").read_text())
    for name in ("mAP", "AP50", "train/loss"):
        assert summary[name] == pytest.approx(undisturbed.metrics[name], rel=1e-4, abs=1e-4)
    images = run.images()
    assert sorted(images) == list(range(END))
    for attempts in images.values():  # a step that was made again saw the same
        assert all(attempt == attempts[0] for attempt in attempts)
    for first in range(0, END, STEPS_PER_EPOCH):
        epoch = [i for step in range(first, first + STEPS_PER_EPOCH) for i in images[step][0]]
        assert len(epoch) == len(set(epoch)) == 24


def test_a_node_that_comes_back_costs_the_steps_since_the_checkpoint(
    nodes: RayNodes, recipe: Path, folder: Path, undisturbed: RunResult
) -> None:
    run = lose_a_node(nodes, recipe, folder / "fixed")
    assert run.groups == [(0, 2), (STEPS_PER_EPOCH, 2)]
    assert_nothing_lost(run, undisturbed)
    repeated = [step for step, attempts in run.images().items() if len(attempts) > 1]
    assert repeated == list(range(STEPS_PER_EPOCH, LOST_AT))


def test_an_elastic_run_goes_on_with_one_node(
    nodes: RayNodes, recipe: Path, folder: Path, undisturbed: RunResult
) -> None:
    run = lose_a_node(nodes, recipe, folder / "elastic", *ELASTIC, "tracking.enabled=true")
    assert run.groups == [(0, 2), (STEPS_PER_EPOCH, 1)]
    assert_nothing_lost(run, undisturbed)
    repeated = [step for step, attempts in run.images().items() if len(attempts) > 1]
    assert repeated == list(range(STEPS_PER_EPOCH, LOST_AT))
    tracked = json.loads((run.run_dir / "mlflow_run.json").read_text())
    history = MlflowClient(tracked["tracking_uri"]).get_metric_history(
        tracked["run_id"], "train/loss"
    )
    assert [point.step for point in history] == list(range(1, END + 1))


def test_machines_whose_name_means_themselves_find_each_other(nodes: RayNodes) -> None:
    reason = why_no_namespaces()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    # The runs above crossed between hosts like this one, without a setting for gloo.
    assert "GLOO_SOCKET_IFNAME" not in nodes.environment
    question = "import socket; print(socket.gethostbyname(socket.gethostname()))"
    asked = nodes.start(["python3", "-c", question], "name", nodes.hosts[1])
    assert asked.wait(30) == 0
    assert (nodes.folder / "name.log").read_text().startswith("127.")


def test_a_node_without_the_package_is_one_clear_sentence(
    nodes: RayNodes, recipe: Path, folder: Path
) -> None:
    reason = why_no_namespaces()
    if reason is not None:
        pytest.skip(f"only root can hide files from one node: {reason}")
    nodes.kill_node(1)
    nodes.start_node(1, without=ROOT / "platform")
    own = folder / "lacking"
    own.mkdir()
    open_gate(own, END)
    settings = [f"run.output={own}", f"cluster.address={nodes.address}"]
    driver = nodes.start(driver_command(recipe, own, settings), "lacking")
    assert driver.wait(START_SECONDS) != 0
    said = (nodes.folder / "lacking.log").read_text()
    assert f"the node {nodes.hosts[1].address} cannot import 'd3etr'" in said, said
    nodes.kill_node(1)
    nodes.start_node(1)
