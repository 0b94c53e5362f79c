"""Stands in for train_net.py: what a training leaves, in no time.

As train_net.py it takes --config-file FILE --resume and overrides. FILE is the config.yaml that the
run has to leave. The environment says what goes wrong: FAIL names a folder whose run fails, STOP
one that stops half-way, once; WAIT is how many seconds each run takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

ITERATIONS = 10


def main() -> None:
    arguments = sys.argv[1:]
    assert arguments[0] == "--config-file" and "--resume" in arguments
    values = dict(text.split("=", 1) for text in arguments if "=" in text)
    folder = Path(values["train.output_dir"].strip("'"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(Path(arguments[1]).read_text())
    metrics = folder / "metrics.json"
    start = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    (folder / f"started_at_{start}").touch()
    time.sleep(float(os.environ.get("WAIT", 0)))
    if folder.name == os.environ.get("FAIL"):
        sys.exit("Traceback: long\nerror: no weights")
    with metrics.open("a") as file:
        for i in range(start, ITERATIONS):
            if folder.name == os.environ.get("STOP") and i == 4 and not start:
                os.abort()
            file.write(json.dumps({"iteration": i, "time": 0.5}) + "\n")
            file.flush()
        file.write(json.dumps({"iteration": ITERATIONS, "sem_seg/mIoU": 40.0}) + "\n")


if __name__ == "__main__":
    main()
