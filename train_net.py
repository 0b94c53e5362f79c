#!/usr/bin/env python
"""Trains or evaluates the model of an experiment file.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
    [--num-gpus N] [--resume] [--eval-only] [--import MODULE] [key=value ...]

The file may also be a yaml config of detectron2, with overrides KEY VALUE ... Several processes and
machines, and torchrun: docs/distributed.md.
"""

import sys
import warnings
from datetime import timedelta

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)

from contrast_d2.engine import (  # noqa: E402
    ProcessFailedError,
    argument_parser,
    import_modules,
    launch,
    load_config,
    main,
)


def run() -> None:
    args = argument_parser().parse_args()
    try:
        import_modules(args.imports)
        cfg = load_config(args.config_file, args.opts)  # mistakes are told before processes start
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            timeout=timedelta(minutes=cfg.train.get("timeout_minutes", 30)),
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ProcessFailedError as error:
        sys.exit(f"{error.traceback}error: {error}")


if __name__ == "__main__":
    run()
