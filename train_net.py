#!/usr/bin/env python
"""Trains or evaluates the model of an experiment file.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
    [--num-gpus N] [--resume] [--eval-only] [--import MODULE] [key=value ...]

The file may also be a yaml config of detectron2, with overrides KEY VALUE ...
"""

import sys
import warnings

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)

from torch.multiprocessing import ProcessExitedException  # noqa: E402

from contrast_d2.engine import (  # noqa: E402
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
        load_config(args.config_file, args.opts)  # a mistake is told before processes start
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ProcessExitedException as error:  # the process has told why
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
