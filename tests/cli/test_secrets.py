"""Credentials: refused in configurations, used from the environment, shown nowhere."""

import logging
from pathlib import Path

import pytest

from d3etr.cli.main import main, whole
from d3etr.config.load import load_config
from d3etr.errors import RunFailedError, UserError
from d3etr.text import redacted

CANARY = "c4nary-Pass.w0rd"
BASE = ("data.digit_scenes={}", "optimisation.steps=10")
TEACHER = ("distillation.method=d3etr", "teacher.weights=")
WITH_SECRETS = (
    f"http://me:{CANARY}@host:5000",
    f"http://me:{CANARY}/x@host:5000/y",
    f"http://me:x@{CANARY}@host:5000/y",
    f"http://{CANARY}@host/a.json",
    f"https://host/a.json?api_key={CANARY}",
    f"https://host/a.json?a=b&key={CANARY}",
    f"https://host/a.json?password={CANARY}",
    f"https://host/a.json?AWSAccessKeyId={CANARY}",
    f"https://host/a.json?sig={CANARY}",
    f"https://host/a.json?X-Amz-Signature={CANARY}",
    f"https://host/a.json?x%2Dgoog%2Dsignature={CANARY}",
    "https://host/a.json?anything=8f5f167f44f4964e6c998dee8271",
    "https://host/a.json?8f5f167f44f4964e6c998dee8271",
    f"https://host/a.json#access_token={CANARY}",
    f"s3://bucket/a.json?token={CANARY}",
    f"zip://a.json::http://me:{CANARY}@host/a.zip",
    f"simplecache::http://me:{CANARY}@host/a.json",
    f" http://me:{CANARY}@host/a.json",
    f"http:/me:{CANARY}@host/a.json",
    f"postgresql://me:{CANARY}@host/db",
)
HARMLESS = (
    "s3://bucket/a.json?versionId=3sL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY",
    "https://host/a.json?raw=true&download=1",
    "https://host/get?file=annotations/instances_train2017.json",
    "hf://datasets/someone/photos@main/a.json",
    "abfs://container@account.dfs.core.windows.net/a.json",
    "sftp://me@host/a.json",
    "http://host:8000/a@b.json",
)


@pytest.mark.parametrize("key", ["tracking.uri", "teacher.weights", "cluster.address"])
@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_credential_in_a_configuration_is_refused_and_not_repeated(
    key: str, url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    section, _, name = key.partition(".")
    recipe.write_text(f"{section}:\n  {name}: '{url}'\n")
    sets = [part for override in BASE for part in ("--set", override)]
    for given in ([str(recipe)], ["--set", f"{key}='{url}'"]):
        assert main(["train", *given, *sets, "--dry-run", "--json"]) == 2
        said = "".join(capsys.readouterr())
        assert f"  - {key}: " in said
        assert "environment" in said or "Credentials belong" in said
        assert CANARY not in said and "8f5f167f44" not in said


@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize("command", ["evaluate", "export", "check-data"])
def test_a_credential_on_the_command_line_is_refused_and_not_repeated(
    command: str, url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = {
        "evaluate": ["evaluate", url, "--annotations", url, "--images", url],
        "export": ["export", url, str(tmp_path / "x")],
        "check-data": ["check-data", "--train", url, url, "--validation", url, url],
    }
    try:
        code = main(arguments[command])
    except SystemExit as end:  # argparse's way
        code = int(str(end.code))
    assert code == 2
    said = "".join(capsys.readouterr())
    assert CANARY not in said and "8f5f167f44" not in said


@pytest.mark.parametrize("url", HARMLESS)
def test_what_only_looks_like_a_credential_is_taken(url: str) -> None:
    config = load_config(None, [*BASE, TEACHER[0], f"{TEACHER[1]}'{url}'"])
    assert config.teacher is not None and str(config.teacher.weights) == url


@pytest.mark.parametrize(
    "text",
    [
        f"HTTPConnectionPool: http://me:{CANARY}@host:5000/api refused",
        f"connection to host failed: user=me password={CANARY}",
        f"headers: Authorization: Basic bWU6{'aHVudGVy'}Mg==",
        f"GET /a?X-Amz-Credential={CANARY}&X-Amz-Expires=300",
    ],
)
def test_errors_of_libraries_lose_credentials(text: str) -> None:
    for kind in (UserError, RunFailedError):
        said = str(kind(f"cannot: {text}"))
        assert "***" in said or "http://host:5000" in said
        assert CANARY not in said and "aHVudGVy" not in said


def test_what_the_environment_keeps_secret_is_said_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:slash%2Fword@host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    said = redacted(f"user me, {CANARY} or slash/word or slash%2Fword at host")
    assert said == "user me, *** or *** or *** at host"


def test_everything_that_a_command_writes_loses_credentials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(_: object) -> None:
        print(f"seen http://me:{CANARY}@host")
        logging.getLogger("somebody").warning("at http://me:%s@host", CANARY)
        raise RuntimeError(f"cannot reach http://me:{CANARY}@host")

    monkeypatch.setattr("d3etr.cli.check_data._config", breaks)
    assert whole(["check-data"]) == 1
    written = capsys.readouterr()
    assert "seen http://host" in written.out
    assert "RuntimeError: cannot reach http://host" in written.err
    assert CANARY not in written.out + written.err
