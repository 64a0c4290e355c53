"""Which version of a registered model is champion."""

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from d3etr.tracking.model import CHAMPION_ALIAS, _set_aliases

NAME = "student"


@pytest.fixture
def client(tmp_path: Path, empty_database: Path) -> MlflowClient:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model(NAME)
    return client


def test_only_higher_quality_on_the_same_data_makes_a_champion(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def champion_after(quality: float | None, data: str) -> str:
        version = client.create_model_version(NAME, source=str(tmp_path)).version
        _set_aliases(client, NAME, str(version), quality, data)
        return str(client.get_model_version_by_alias(NAME, CHAMPION_ALIAS).version)

    assert champion_after(0.3, "scenes") == "1"
    assert champion_after(0.2, "scenes") == "1"
    assert champion_after(0.9, "others") == "1"
    assert "version 3 was measured on other data" in caplog.text
    assert champion_after(None, "scenes") == "1"
    assert champion_after(0.4, "scenes") == "5"


def test_of_two_that_end_at_the_same_moment_the_better_is_champion(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        str(client.create_model_version(NAME, source=str(tmp_path)).version) for _ in range(2)
    )
    ask = client.get_model_version_by_alias

    def ask_while_the_other_ends(name: str, alias: str) -> object:
        monkeypatch.setattr(client, "get_model_version_by_alias", ask)
        try:
            return ask(name, alias)
        finally:
            _set_aliases(client, NAME, second, 0.4, "scenes")

    monkeypatch.setattr(client, "get_model_version_by_alias", ask_while_the_other_ends)
    _set_aliases(client, NAME, first, 0.3, "scenes")
    assert str(ask(NAME, CHAMPION_ALIAS).version) == second
    _set_aliases(client, NAME, first, 0.40004, "scenes")
    assert str(ask(NAME, CHAMPION_ALIAS).version) == second, "equal to what tables show"
