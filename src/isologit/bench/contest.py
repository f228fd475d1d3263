"""The contest's own record of a load run: its result file and the line its log ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isologit.bench.records import LoadRun
from isologit.common.files import write_json


def contest_records(run: LoadRun) -> list[dict[str, Any]]:
    """Completed requests in the order of completion; seconds count from sending, as the contest counts."""
    done = [record for record in run.records if record.status == "completed"]
    done.sort(key=lambda record: record.finished_s or 0.0)
    listed = []
    for record in done:
        assert record.sent_s is not None
        assert record.first_token_s is not None
        assert record.finished_s is not None
        listed.append(
            {
                "input": record.request.prompt,
                "resp_text": record.text,
                "res_time": record.finished_s - record.sent_s,
                "first_token_time": record.first_token_s - record.sent_s,
            }
        )
    return listed


def write_contest_result(folder: Path, request_rate: float, run: LoadRun) -> Path:
    """Write `result_{X}_x.json`, X being the rate as a decimal number. Raises OutputFolderError when it cannot."""
    path = folder / f"result_{request_rate}_x.json"
    write_json(path, contest_records(run))
    return path


def contest_line(run: LoadRun) -> str:
    """`All Tasks Done; Exec Time is S`, S being the seconds of the whole run; other words when an answer is missing."""
    lost = sum(record.status != "completed" for record in run.records)
    if lost:
        return f"{lost} of {len(run.records)} tasks have no answer; Exec Time does not count"
    return f"All Tasks Done; Exec Time is {run.duration_s}"
