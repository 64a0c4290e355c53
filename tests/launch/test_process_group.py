import os
import sys

import pytest
import ray.util

from d3etr.launch.process_group import VARIABLE, interface_of, name_interface

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="lo is Linux's name")


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None


def test_gloo_is_told_the_interface_of_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back afterwards
    monkeypatch.delenv(VARIABLE)
    name_interface()
    assert os.environ[VARIABLE] == "lo"


def test_the_users_interface_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(VARIABLE, "mine")
    name_interface()
    assert os.environ[VARIABLE] == "mine"
