"""`contrast-d2 PROGRAM ARGUMENTS`, or `python -m contrast_d2`: the programs of the repository, from
anywhere. `contrast-d2 train_net` is `python train_net.py`, `contrast-d2 plot_run` is
`python tools/plot_run.py`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .resources import resource


def programs() -> dict[str, Path]:
    """Files of the programs by name."""
    tools = sorted(resource("tools").glob("*.py"))
    return {path.stem: path for path in (resource("train_net.py"), *tools)}


def main() -> None:
    """Runs the program that the command line names, as if its file had been called."""
    try:
        known = programs()
    except ValueError as error:
        sys.exit(f"error: {error}")
    usage = (
        "usage: contrast-d2 PROGRAM [ARGUMENT ...]\n\n"
        f"programs: {', '.join(known)}\n\n"
        "`contrast-d2 PROGRAM --help` says what a program does. `--config-file configs/...` names\n"
        "an experiment file that comes with the package; `copy_configs` copies them all.\n"
    )
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.stdout.write(usage)
        return
    if sys.argv[1] not in known:
        sys.exit(f"error: {sys.argv[1]}: there is no such program. There are {', '.join(known)}.")
    path = str(known[sys.argv[1]])
    sys.argv[:2] = [path]
    sys.path[0] = str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
