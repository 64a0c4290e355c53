"""What docker/compose.yaml describes, with real processes: jobs are submitted, run and tracked."""

import http.client
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from processes import running
from tiny_recipe import tiny_recipe
from topology import Topology, copy_project, postgres_programs

from d3etr.engine.journal import read_journal

pytestmark = pytest.mark.slow

# Each node has two CPUs: one worker on each.
RECIPE = tiny_recipe(
    optimisation={"epochs": 2},
    cluster={"workers": 2, "cpus_per_worker": 2},
    tracking={"enabled": True},
)


@pytest.fixture(scope="module")
def services() -> Iterator[Topology]:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL server programs here (Debian: apt-get install postgresql)")
    if find_spec("moto") is None:
        pytest.skip("moto, the stand-in for the S3 store, is not installed (pip install moto[s3])")
    # Ray's sockets are in it, and their paths may have 107 characters: not pytest's long folder.
    folder = Path(tempfile.mkdtemp(prefix="d3etr-"))
    topology = Topology(folder)
    try:
        with topology:
            (topology.project / "trainers" / "recipes" / "tiny.yaml").write_text(RECIPE)
            yield topology
        assert topology.ended and not topology.ended & running()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def complete_run(job: CompletedProcess[str], output: Path) -> Path:
    """The folder of the one run in ``output``, which has everything that a run leaves."""
    assert job.returncode == 0, job.stdout + job.stderr
    (run_dir,) = (path.parent for path in output.glob("tiny-*/config.yaml"))
    for name in ("weights.safetensors", "summary.json", "journal.jsonl", "mlflow_run.json"):
        assert (run_dir / name).stat().st_size > 0
    assert list((run_dir / "checkpoints").glob("step-*/manifest.json"))
    assert not (run_dir / "lock").exists()
    assert json.loads((run_dir / "mlflow_run.json").read_text())["complete"], job.stdout
    steps = [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1))
    return run_dir


def tracked_run(services: Topology, run_dir: Path) -> Run:
    """The run in MLflow that belongs to the folder."""
    run_id = json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]
    return MlflowClient(services.tracking_uri).get_run(run_id)


def test_a_job_runs_from_the_project_on_the_nodes(services: Topology) -> None:
    imported = services.run(["python", "-c", "import d3etr"], services.client)
    assert "No module named 'd3etr'" in imported.stderr, "it is installed: this proves nothing"
    # Its paths are relative to the folder that the nodes started in, where volumes are mounted.
    job = services.submit("python", "trainers/run.py", "trainers/recipes/tiny.yaml")
    run_dir = complete_run(job, services.project / "runs")
    assert "succeeded" in job.stdout
    assert "2 workers with 2 CPUs each (4 CPUs and 0 GPUs on 3 nodes)" in job.stdout
    run = tracked_run(services, run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimisation.epochs"] == "2"
    assert {"train/loss", "val/mAP", "final/mAP"} <= set(run.data.metrics)
    history = MlflowClient(services.tracking_uri).get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 13))

    # Not only MLflow's word: the row is in PostgreSQL, the files are in the S3 store.
    query = f"select status from runs where run_uuid = '{run.info.run_id}'"
    assert services.query(query) == [("FINISHED",)]
    stored = objects(services, f"1/{run.info.run_id}/artifacts/")
    assert {"config.yaml", "summary.json", "journal.jsonl"} <= stored
    assert {"weights/weights.safetensors", "figures/precision_recall.png"} <= stored


def objects(services: Topology, prefix: str) -> set[str]:
    """Names of what the S3 store holds below a prefix."""
    import boto3

    store = boto3.client(
        "s3",
        endpoint_url=services.settings("mlflow")["MLFLOW_S3_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )
    found = store.list_objects_v2(Bucket="mlflow", Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(prefix) for entry in found}


def test_a_job_brings_its_own_code(services: Topology, tmp_path: Path) -> None:
    checkout, shared = tmp_path / "checkout", tmp_path / "shared"
    copy_project(checkout)
    (checkout / "tiny.yaml").write_text(RECIPE)
    settings = [f"run.output={shared / 'runs'}", f"data.digit_scenes.root={shared / 'data'}"]
    settings += ["run.seed=1", "optimisation.epochs=1", "tracking.figures=false"]
    job = services.submit(
        *["python", "trainers/run.py", "tiny.yaml", *with_settings(settings)],
        options=[f"--working-dir={checkout}"],
    )
    # d3etr is installed nowhere: without the code that came along nothing could run.
    run_dir = complete_run(job, shared / "runs")
    assert tracked_run(services, run_dir).info.status == "FINISHED"


def with_settings(settings: list[str]) -> list[str]:
    """``--set`` before each."""
    return [part for setting in settings for part in ("--set", setting)]


def test_a_client_without_the_token_is_refused(services: Topology) -> None:
    refused = services.run(["ray", "job", "submit", "--", "true"], services.tokenless)
    assert refused.returncode != 0
    assert "AuthenticationError: Authentication required" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ({}, "InvalidAuthToken: Authentication token is missing"),
        ({"RAY_AUTH_MODE": "token"}, "It asks for a token: set RAY_AUTH_MODE=token"),
    ],
    ids=["mode not set", "no token"],
)
def test_a_run_without_the_token_is_told_what_is_missing(
    services: Topology, mode: dict[str, str], reason: str
) -> None:
    settings = [f"cluster.address={services.gcs_address}", "tracking.enabled=false"]
    project = services.project / "trainers"
    run = ["python", str(project / "run.py"), str(project / "recipes" / "tiny.yaml")]
    refused = services.run([*run, *with_settings(settings)], services.tokenless | mode)
    assert refused.returncode == 2
    assert reason in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("name", "status"), [("mlflow", 200), ("127.0.0.1", 200), ("evil.example", 403)]
)
def test_mlflow_answers_by_its_names_and_no_others(
    services: Topology, name: str, status: int
) -> None:
    port = int(services.ports["5000"])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    connection.request("GET", path, headers={"Host": f"{name}:{port}"})
    assert connection.getresponse().status == status
    connection.close()
