"""MLflow's pages in a real browser: names, order, columns, charts, nesting, pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tracked_folders import journal_records, write_journal

from d3etr.config.tree import Config
from d3etr.tracking.address import run_page
from d3etr.tracking.charts import charted_page
from d3etr.tracking.runs import open_tracker, replay
from d3etr.tracking.state import RunState, read_state
from d3etr.tracking.sweeps import SweepRun, Swept

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: as root, 'apt-get install chromium' (make test does it as root)",
    ),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 60_000
"""Milliseconds; a busy machine takes long to draw a page."""
ASSISTANT_CLOSED = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
DISTILLED: dict[str, Any] = {"teacher": {"weights": "teacher.safetensors"}}

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


@pytest.fixture
def page() -> Iterator[Any]:
    """A browser's page, as after the assistant was closed once."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        context.add_init_script(ASSISTANT_CLOSED)
        context.set_default_timeout(PATIENCE)
        yield context.new_page()
        browser.close()


def students(make_config: MakeConfig, make_run: MakeRun, uri: str) -> list[RunState]:
    """A plain and a D3ETR student."""
    found = []
    distilled = DISTILLED | {"distillation": {"method": "d3etr"}}
    for hour, name, mAP, sections in (
        (0, "digits-plain", 0.2, {}),
        (1, "digits-d3etr", 0.4, distilled),
    ):
        config = make_config(name, tracking={"uri": uri}, **sections)
        folder = make_run(config, mAP)
        records = journal_records(20, mAP)
        write_journal(folder, [each | {"time": each["time"] + 3600 * hour} for each in records])
        assert replay(folder) is None
        found.append(read_state(folder))
    return [state for state in found if state is not None]


def swept(make_config: MakeConfig, make_run: MakeRun, uri: str, folder: Path) -> SweepRun:
    """Three trials of which the second is the best."""
    folder.mkdir()
    config = make_config(tracking={"uri": uri})
    sweep = SweepRun(config, folder, "The matching ratios", {"seeds": "0"})
    trials = []
    for ratio, mAP in ((0.0, 0.3), (0.5, 0.5), (1.0, 0.1)):
        method = {"method": "d3etr", "adaptive_ratio": ratio}
        name = f"trial-{ratio:g}"
        trial = make_config(name, tracking={"uri": uri}, **DISTILLED, distillation=method)
        run_dir = make_run(trial, mAP)
        title = f"adaptive_ratio={ratio:g}"
        tracker = open_tracker(trial, run_dir, parent_run=sweep.run_id, name=title)
        assert tracker.finish("FINISHED") is None
        trials.append(Swept(title, mAP, run_dir))
    assert sweep.finish("FINISHED", trials, []) is None
    return sweep


def names(page: Any) -> list[str]:
    """Of the runs in the table, from the top."""
    links = page.locator(".ag-row a[href*='/runs/']").all()
    placed = [(link.bounding_box()["y"], link.inner_text()) for link in links]
    return [text for _, text in sorted(placed) if text]


def test_the_pages_read_well(
    make_config: MakeConfig, make_run: MakeRun, server: Any, tmp_path: Path, page: Any
) -> None:
    runs = students(make_config, make_run, server.uri)
    sweep = swept(make_config, make_run, server.uri, tmp_path / "runs" / "ratios-12345678")
    listed = ", ".join(f"'{run.run_id}'" for run in runs)
    search, order_by = f"attributes.run_id IN ({listed})", "attributes.start_time"
    client = MlflowClient(server.uri)
    shown = charted_page(client, runs[0].experiment_id, search, order_by, ascending=True)
    comparison = f"{server.uri}/{shown}"

    # The comparison has the curves of both students, plain first.
    page.goto(comparison)
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(1).wait_for()
    title = page.get_by_text("val/mAP", exact=True).first
    assert title.bounding_box()["y"] < 500, "what counts comes first"
    assert names(page) == ["plain student · digits · seed 0", "D3ETR student · digits · seed 0"]

    # All runs: the sweep is one of them, its trials are below it.
    page.goto("about:blank")
    page.goto(f"{server.uri}/#/experiments/{runs[0].experiment_id}/runs")
    page.get_by_text("sweep · ratios-12345678").wait_for()
    assert not any("adaptive_ratio" in name for name in names(page))
    row = page.locator(".ag-row", has=page.get_by_text("sweep · ratios-12345678"))
    row.get_by_role("button").first.click()
    page.get_by_text("adaptive_ratio=0.5").wait_for()
    assert [name for name in names(page) if "adaptive_ratio" in name]

    # The sweep's own page: best first, with charts.
    page.goto("about:blank")
    page.goto(sweep.how_to_open()[-1])
    page.locator(".js-plotly-plot").first.wait_for()
    assert names(page) == [f"adaptive_ratio={ratio}" for ratio in ("0.5", "0", "1")]

    # Its description leads to the trials.
    parent = run_page(runs[0].experiment_id, sweep.run_id)
    page.goto("about:blank")
    page.goto(f"{server.uri}/{parent}")
    link = page.get_by_role("link", name="The trials, best first, with charts")
    link.wait_for()
    assert "viewStateShareKey=d3etr-" in (link.get_attribute("href") or "")
