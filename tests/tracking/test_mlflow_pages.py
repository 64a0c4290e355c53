"""MLflow's pages in a real browser: names, order, columns, charts, nesting, pictures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tracked_folders import journal_records, write_journal

from d3etr.config.tree import Config
from d3etr.tracking.address import run_page
from d3etr.tracking.runs import open_tracker, replay
from d3etr.tracking.state import RunState, read_state
from d3etr.tracking.sweeps import SweepRun, Swept
from d3etr.tracking.views import comparison_page

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
PATIENCE = 180_000
"""Milliseconds; a busy machine takes long to draw a page."""
ASSISTANT_CLOSED = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
RATIO = "distillation.adaptive_ratio"
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


def students(make_config: MakeConfig, make_run: MakeRun, uri: str) -> tuple[Config, list[RunState]]:
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
    return config, [state for state in found if state is not None]


def swept(make_config: MakeConfig, make_run: MakeRun, uri: str, folder: Path) -> SweepRun:
    """Three trials of which the second is the best."""
    folder.mkdir()
    config = make_config(tracking={"uri": uri})
    sweep = SweepRun(config, folder, "The matching ratios", {"seeds": "0"}, [RATIO])
    trials = []
    for ratio, mAP in ((0.0, 0.3), (0.5, 0.5), (1.0, 0.1)):
        method = {"method": "d3etr", "adaptive_ratio": ratio}
        name = f"trial-{ratio:g}"
        trial = make_config(name, tracking={"uri": uri}, **DISTILLED, distillation=method)
        run_dir = make_run(trial, mAP)
        title = f"adaptive_ratio={ratio:g}"
        tracker = open_tracker(trial, run_dir, parent_run=sweep.run_id, name=title)
        assert tracker.finish("FINISHED") is None
        trials.append(Swept(title, title, {"adaptive_ratio": ratio}, mAP, mAP, run_dir))
    assert sweep.finish("FINISHED", trials, [], keys=["adaptive_ratio"]) is None
    return sweep


def names(page: Any) -> list[str]:
    """Of the runs in the table, from the top."""
    links = page.locator(".ag-row a[href*='/runs/']").all()
    placed = [(link.bounding_box()["y"], link.inner_text()) for link in links]
    return [text for _, text in sorted(placed) if text]


def columns(page: Any) -> list[str]:
    """Of the table, from the left."""
    heads = page.locator(".ag-header-cell[col-id]").all()
    placed = [(head.bounding_box()["x"], head.get_attribute("col-id")) for head in heads]
    return [name for _, name in sorted(placed)]


def test_the_pages_read_well(
    make_config: MakeConfig, make_run: MakeRun, server: Any, tmp_path: Path, page: Any
) -> None:
    config, runs = students(make_config, make_run, server.uri)
    sweep = swept(make_config, make_run, server.uri, tmp_path / "runs" / "ratios-12345678")
    comparison = f"{server.uri}/{comparison_page(config, runs, last_step=20)}"

    # The comparison begins with the curves of both students, plain first.
    page.goto(comparison)
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(1).wait_for()
    assert names(page) == ["plain student · digits · seed 0", "D3ETR student · digits · seed 0"]
    drawn = page.locator(".js-plotly-plot").first.evaluate(
        "plot => plot.data.map(line => Array.from(line.y || []))"
    )
    assert [0.1, 0.2] in drawn and [0.2, 0.4] in drawn, "mAP of both, at both measurements"
    titles = re.findall(r"val/mAP|test/mAP|train/loss", page.locator("body").inner_text())
    assert titles[0] == "val/mAP"

    # As a table it shows results and cost instead of everything.
    page.goto("about:blank")
    page.goto(comparison.replace("&compareRunsMode=CHART", ""))
    page.locator(".ag-header-cell[col-id='metrics.`val/mAP`']").wait_for()
    page.get_by_text("D3ETR student · digits · seed 0").wait_for()
    shown = columns(page)
    assert shown.index("attributes.`Run Name`") < shown.index("metrics.`val/mAP`")
    assert "params.`optimisation.steps`" in shown and "attributes.`Source`" not in shown

    # All runs: the sweep is one of them, its trials are below it.
    page.goto("about:blank")
    page.goto(f"{server.uri}/#/experiments/{runs[0].experiment_id}/runs")
    page.get_by_text("sweep · ratios-12345678").wait_for()
    assert not any("adaptive_ratio" in name for name in names(page))
    row = page.locator(".ag-row", has=page.get_by_text("sweep · ratios-12345678"))
    row.get_by_role("button").first.click()
    page.get_by_text("adaptive_ratio=0.5").wait_for()
    assert [name for name in names(page) if "adaptive_ratio" in name]

    # The sweep's own page: best first, with parallel coordinates.
    page.goto("about:blank")
    page.goto(sweep.how_to_open()[-1])
    page.locator(".parcoords").first.wait_for()
    assert names(page) == [f"adaptive_ratio={ratio}" for ratio in ("0.5", "0", "1")]

    # A picture among the sweep's files is shown; its description leads to the trials.
    parent = run_page(runs[0].experiment_id, sweep.run_id)
    page.goto("about:blank")
    page.goto(f"{server.uri}/{parent.replace('?', '/artifacts/cases.png?')}")
    picture = page.locator("img[src^='blob:'], img[src^='data:'], img[src*='artifact']").first
    picture.wait_for()
    page.wait_for_function("[...document.images].some(image => image.naturalWidth > 500)")
    page.goto("about:blank")
    page.goto(f"{server.uri}/{parent}")
    link = page.get_by_role("link", name="The trials, best first, with charts")
    link.wait_for()
    assert "viewStateShareKey=d3etr-" in (link.get_attribute("href") or "")
