"""Runs train_net.py and kills its process, with SIGKILL, at a chosen moment.

    killed_run.py MOMENT ITERATION TRAIN_NET_ARGUMENT ...

MOMENT is `step` (before that iteration), `write` (half-way through writing that iteration's
checkpoint), `rename` (before the complete file gets its name), `tag` (before `last_checkpoint`
names it), `evaluation` (in the evaluation after that iteration), or the name of another signal,
which it gets before that iteration.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    moment, iteration, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    import torch

    from contrast_d2.engine import Checkpointer, Trainer, checkpoint
    from contrast_d2.evaluation import SemSegEvaluator

    target = f"model_{iteration:07d}.pth"
    if moment == "step":
        run_step = Trainer.run_step
        Trainer.run_step = lambda self: die() if self.iter == iteration else run_step(self)
    elif moment in signal.Signals.__members__:
        run_step = Trainer.run_step

        def get_signal(self) -> None:
            if self.iter == iteration:
                os.kill(os.getpid(), signal.Signals[moment])
            run_step(self)

        Trainer.run_step = get_signal
    elif moment == "evaluation":
        SemSegEvaluator.evaluate = lambda _: die()
    elif moment == "write":
        save = torch.save

        def half(data, file) -> None:
            if target not in file.name:
                return save(data, file)
            whole = io.BytesIO()
            save(data, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()

        checkpoint.torch.save = half
    elif moment == "rename":
        replace = os.replace
        checkpoint.os.replace = lambda a, b: die() if target in b else replace(a, b)
    elif moment == "tag":
        tag = Checkpointer.tag_last_checkpoint
        Checkpointer.tag_last_checkpoint = lambda self, name: (
            die() if name == target else tag(self, name)
        )
    else:
        raise SystemExit(f"unknown moment {moment}")

    import train_net

    sys.argv = ["train_net.py", *arguments]
    train_net.run()


if __name__ == "__main__":
    main()
