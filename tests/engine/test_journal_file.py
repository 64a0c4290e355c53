import json
import threading
from pathlib import Path

import pytest

from d3etr.engine.journal import Journal, JournalReader, Record, follow_journal, read_journal
from d3etr.errors import UserError


def steps(records: list[Record]) -> list[int]:
    return [record["step"] for record in records]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", 0, steps=10)
    journal.write("step", 5, epoch=0, metrics={"train/loss": 1.5})
    journal.message(5, "careful", "warning")
    records = read_journal(journal.path)
    assert [record["kind"] for record in records] == ["start", "step", "message"]
    assert records[1]["metrics"] == {"train/loss": 1.5}
    assert records[2]["level"] == "warning"


def test_cutting_back_keeps_what_led_to_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in (0, 5, 10, 15, 20):
        journal.write("step", step)
    assert journal.cut_back(10) == 2
    assert steps(read_journal(journal.path)) == [0, 5, 10]
    assert journal.cut_back(10) == 0


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("step", 5)
    with journal.path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert steps(read_journal(journal.path)) == [5]
    assert journal.cut_back(10) == 1
    journal.write("step", 6)
    assert steps(read_journal(journal.path)) == [5, 6]


def test_only_the_first_worker_keeps_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", active=False)
    journal.write("step", 1)
    assert journal.cut_back(0) == 0
    assert not journal.path.exists()


def test_a_nan_never_reaches_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        journal.write("step", 1, metrics={"train/loss": float("nan")})
    assert read_journal(journal.path) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no space left: the journal could not be written"):
        Journal(Path("/dev/full")).write("step", 1)


def follow_in_steps(path: Path, actions: list) -> list[Record]:
    """Run one action between looks at the journal, then finish."""
    pending = iter(actions)

    def finished() -> bool:
        action = next(pending, None)
        if action is None:
            return True
        action()
        return False

    return list(follow_journal(JournalReader(path), finished, poll_seconds=0.0))


def test_a_follower_sees_every_record_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    actions = [lambda s=s: journal.write("step", s) for s in (1, 2, 3)]
    assert steps(follow_in_steps(journal.path, actions)) == [1, 2, 3]


def test_a_follower_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    line = json.dumps({"kind": "step", "step": 1}) + "\n"

    def append(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    actions = [lambda: append(line[:9]), lambda: append(line[9:])]
    assert steps(follow_in_steps(path, actions)) == [1]


def test_a_follower_goes_on_behind_what_both_versions_share(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")

    def write(*numbers: int, **fields: object) -> None:
        for number in numbers:
            journal.write("step", number, **fields)

    def resume() -> None:
        journal.cut_back(2)
        write(3, 4, 5, attempt=2)  # longer than before: the file's size gives nothing away

    records = follow_in_steps(journal.path, [lambda: write(1, 2, 3, 4), resume])
    assert steps(records) == [1, 2, 3, 4, 3, 4, 5]
    assert [record.get("attempt") for record in records] == [None] * 4 + [2] * 3


def test_what_is_written_before_the_end_is_still_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    stop = threading.Event()
    found: list[Record] = []
    thread = threading.Thread(
        target=lambda: found.extend(follow_journal(JournalReader(journal.path), stop.is_set, 0.01))
    )
    thread.start()
    for step in range(50):
        journal.write("step", step)
    stop.set()
    thread.join()
    assert steps(found) == list(range(50))


DAMAGE = (
    b"\x00\x00\x00\x00",
    b"\xff\xfe not text",
    b'{"kind": "step", "st{"kind": "step", "step": 4}',
    b"[" * 5000,
    b'"a text"',
    b'{"kind": "step"}',
    b'{"kind": 5, "step": 4}',
    b'{"kind": "step", "step": "4"}',
    b'{"kind": "step", "step": true}',
    b'{"kind": "step", "step": 1e3}',
    b'{"kind": "step", "step": ' + b"9" * 5000 + b"}",
    b'{"kind": "step", "step": 4, "time": "noon"}',
    b'{"kind": "step", "step": 4, "time": NaN}',
    b'{"kind": "step", "step": 4, "metrics": [1]}',
    b'{"kind": "step", "step": 4, "metrics": {"train/loss": "1"}}',
    b'{"kind": "evaluation", "step": 4}',
    b'{"kind": "start", "step": 0, "steps": null}',
)


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_in_the_middle_is_named_and_the_rest_is_used(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("step", 1)
    with journal.path.open("ab") as file:
        file.write(damage + b"\n")
    journal.write("step", 2)
    journal.write("step", 3)
    assert steps(read_journal(journal.path)) == [1, 2, 3]
    assert steps(follow_in_steps(journal.path, [])) == [1, 2, 3]
    [warning] = caplog.messages  # once, however often the journal is read
    assert warning.startswith(f"{journal.path} is damaged: line 2 is left out")
    assert journal.cut_back(2) == 2
    [first, second, message] = read_journal(journal.path)
    assert steps([first, second]) == [1, 2]
    assert message["text"] == "the journal had damage: line 2 is lost"
    assert message["level"] == "warning" and message["step"] == 2
    assert journal.cut_back(2) == 0


def test_damage_that_is_cut_off_anyway_is_no_loss(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("step", 1)
    journal.write("step", 2)
    with journal.path.open("a") as file:
        file.write("garbage\n")
    assert journal.cut_back(1) == 2
    assert [record["kind"] for record in read_journal(journal.path)] == ["step"]
