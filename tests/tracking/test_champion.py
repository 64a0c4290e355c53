"""Which version of a registered model is champion."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from d3etr.tracking.model import CHAMPION_ALIAS, _set_aliases

NAME = "student"


def test_only_higher_quality_on_the_same_data_makes_a_champion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model(NAME)

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
