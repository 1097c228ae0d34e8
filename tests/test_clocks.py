"""A clock that is wrong, or set while a run goes on, changes nothing that a run computes or waits for."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIME_OF_DAY = re.compile(r"\btime\.time\(|\bdatetime\.now\(|\btime_ns\(|\butcnow\(|\bdate\.today\(")
# Who may ask for it, and what for.
READERS = {
    "fedllm/chained_log.py",  # when something happened
    "scripts/event_log.py",  # the same
    "clients/gate.py",  # how many questions a site has answered in so many days
    "clients/service.py",  # how long nothing of an ended run has changed, which keep-days counts
    "clients/withdrawn.py",  # when a site withdrew, in its record
    "strategies/trackers.py",  # when a figure was sent, for the axis of a tracker
    "scripts/deploying/certificates.py",  # until when a certificate is valid
}


def test_the_time_of_day_decides_nothing() -> None:
    rooms = [ROOT / room for room in ("fedllm", "clients", "strategies", "scripts")]
    files = {path.relative_to(ROOT).as_posix(): path for room in rooms for path in room.rglob("*.py")}
    found = {name for name, path in files.items() if TIME_OF_DAY.search(path.read_text())}
    assert {name for name in found if not name.startswith("scripts/benchmarks/")} <= READERS
