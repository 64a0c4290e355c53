"""What losing a node costs: a distilled run over two hosts, one of which dies and comes back.

``PYTHONPATH=platform:tests python tests/cluster/node_loss.py`` prints it as a table, with and
without elastic training.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ray_nodes import START_SECONDS, RayNodes, ray_nodes, wait_until
from tiny import save_untrained
from tiny_recipe import SECTIONS, tiny_recipe

from d3etr.config.load import load_config
from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import Record, read_journal

STEPS_PER_EPOCH, EPOCHS = 6, 4
LOST_AT, FOUND_AT = 9, 16
"""Steps after which the node dies, in the second epoch, and comes back, in the third."""
END = STEPS_PER_EPOCH * EPOCHS
ELASTIC = ("cluster.minimum_workers=1", "cluster.start_timeout_seconds=40")
"""Ray waits so long for a lost node that it does not miss yet."""


@dataclass(frozen=True)
class Loss:
    """How a run went whose node was lost.

    Attributes:
        run_dir: the run's folder.
        folder: of what the workers wrote besides.
        driver: what the driver wrote.
        lost: unix time at which the node was killed.
        found: unix time at which it was back.
    """

    run_dir: Path
    folder: Path
    driver: str
    lost: float
    found: float

    @property
    def steps(self) -> list[Record]:
        """The journal's records of steps."""
        return [record for record in self._journal if record["kind"] == "step"]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(first step, workers) of each group whose steps are in the journal."""
        starts = [record for record in self._journal if record["kind"] == "start"]
        return [(record["step"], record["workers"]) for record in starts]

    def images(self) -> dict[int, list[list[int]]]:
        """By step, the sorted images of each time that it was made, in this order.

        The files of workers that started together come together.
        """
        made: dict[int, list[list[int]]] = {}
        missing: dict[int, int] = {}
        for file in sorted((self.folder / "seen").glob("*.jsonl")):
            for record in map(json.loads, file.read_text().splitlines()):
                step = int(record["step"])
                if not missing.get(step):
                    made.setdefault(step, []).append([])
                    missing[step] = int(record["workers"])
                made[step][-1] = sorted(made[step][-1] + record["images"])
                missing[step] -= 1
        return made

    def pause_after_loss(self) -> float:
        """Seconds from the node's death to the end of the next step."""
        return next(r["time"] for r in self.steps if r["time"] > self.lost) - self.lost

    def repeated_after_loss(self) -> int:
        """Steps that had been made and were made again."""
        return LOST_AT - self.groups[1][0]

    @property
    def _journal(self) -> list[Record]:
        return read_journal(self.run_dir / "journal.jsonl")


def write_recipe(folder: Path) -> Path:
    """The recipe, with its data and teacher made."""
    recipe = folder / "tiny.yaml"
    scenes = {**SECTIONS["data"]["digit_scenes"], "root": str(folder / "scenes")}
    detector = {**SECTIONS["student"]["detector"], "dropout": 0.1}
    text = tiny_recipe(
        run={"output": str(folder / "runs")},
        data={"digit_scenes": scenes},
        teacher={"weights": str(folder / "teacher.safetensors")},
        student={"detector": detector},
        distillation={"method": "d3etr"},
        optimisation={"epochs": EPOCHS},
        cluster={"workers": 2, "maximum_failures": 3, "start_timeout_seconds": 120},
        tracking={"figures": False},
    )
    recipe.write_text(text)
    config = load_config(recipe)
    if not (folder / "teacher.safetensors").exists():
        teacher = config.student.detector.model_copy(update={"queries": 8, "dropout": 0.0})
        save_untrained(folder / "teacher.safetensors", teacher, config.data)
    return recipe


def lose_a_node(nodes: RayNodes, recipe: Path, folder: Path, *overrides: str) -> Loss:
    """Train on two nodes, kill one in the middle, bring it back, train to the end.

    An elastic run (``cluster.minimum_workers=1``) makes some steps without the node.

    Args:
        nodes: a cluster of two nodes.
        recipe: what to train.
        folder: of this run; new.
        *overrides: settings.
    """
    folder.mkdir()
    settings = [f"run.output={folder}", f"cluster.address={nodes.address}", *overrides]
    config, elastic = load_config(recipe, settings), "cluster.minimum_workers=1" in overrides
    journal, log = folder_of(config).journal, nodes.folder / f"{folder.name}.log"

    def reached(step: int, *workers: int) -> bool:
        records = read_journal(journal)
        groups = [record["workers"] for record in records if record["kind"] == "start"]
        return groups == list(workers) and records[-1]["step"] >= step

    open_gate(folder, LOST_AT)
    driver = nodes.start(driver_command(recipe, folder, settings), folder.name)
    try:
        wait_until(lambda: reached(LOST_AT, 2), driver, log)
        nodes.kill_node(1)
        lost = time.time()
        if elastic:
            wait_until(lambda: reached(LOST_AT, 2, 1), driver, log)
            open_gate(folder, FOUND_AT)
            wait_until(lambda: reached(FOUND_AT, 2, 1), driver, log)
        nodes.start_node(1)
        found = time.time()
        if not elastic:
            # The gate stays closed until the workers of before are gone.
            wait_until(lambda: reached(LOST_AT, 2, 2), driver, log)
        open_gate(folder, END)
        driver.wait(START_SECONDS)
    finally:
        driver.kill()
    text = log.read_text()
    assert driver.returncode == 0, text
    return Loss(journal.parent, folder, text, lost, found)


def driver_command(recipe: Path, folder: Path, settings: list[str]) -> list[str]:
    """The command of a driver whose workers wait at the gate in ``folder``."""
    script = str(Path(__file__).with_name("gated_run.py"))
    return [sys.executable, script, str(recipe), str(folder), *settings]


def open_gate(folder: Path, step: int) -> None:
    """Let the workers train until ``step``."""
    (folder / "gate.new").write_text(str(step))
    (folder / "gate.new").replace(folder / "gate")


def main() -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp(prefix="d3etr-"))
    try:
        with ray_nodes(folder) as nodes:
            recipe = write_recipe(folder)
            fixed = lose_a_node(nodes, recipe, folder / "fixed")
            elastic = lose_a_node(nodes, recipe, folder / "elastic", *ELASTIC)
        print(table(fixed, elastic))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(fixed: Loss, elastic: Loss) -> str:
    """The costs, in Markdown."""
    rows = [
        ("two workers or none", fixed.found - fixed.lost, fixed.pause_after_loss(), fixed),
        ("elastic, 2 to 1", None, elastic.pause_after_loss(), elastic),
    ]
    lines = [
        "| run | node away | no step for | steps made again | epochs |",
        "|---|---|---|---|---|",
    ]
    for name, away, pause, loss in rows:
        gone = "-" if away is None else f"{away:.0f} s"
        steps = loss.repeated_after_loss()
        epochs = steps / STEPS_PER_EPOCH
        lines.append(f"| {name} | {gone} | {pause:.0f} s | {steps} | {epochs:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
