"""The lines of JSON that a server logs."""

import io
import json
from datetime import datetime

from fedllm.runs.records import PrivacyRecord, RoundRecord, TrainingRecord
from scripts.event_log import EventLog


def test_each_event_is_one_line_with_its_time() -> None:
    file = io.StringIO()
    log = EventLog("trial", file)
    log.notice("the SuperLink was killed\nby SIGKILL")
    log.replay(RoundRecord(round_num=1))
    log.record(
        RoundRecord(
            round_num=2,
            asked=("a", "b"),
            accepted=("a",),
            lost={"b": "no reply within 60 s"},
            codes={"b": "lost"},
            training=TrainingRecord(loss=float("nan")),
            privacy=PrivacyRecord(epsilon=0.5, noise_multiplier=1.0, clip=1.0),
        )
    )
    notice, record = map(json.loads, file.getvalue().splitlines())
    assert (notice["event"], notice["run"]) == ("notice", "trial")
    assert datetime.fromisoformat(notice["time"]).tzinfo
    assert {"round": 2, "accepted": 1, "asked": 2, "lost": {"b": "lost"}, "epsilon": 0.5}.items() <= (
        record.items()
    )
    assert record["loss"] is None
