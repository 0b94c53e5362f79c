"""Our experiments under detectron2's own training program, `tools/lazyconfig_train_net.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
SHAPES = "configs/shapes/semfpn_r18_ms_cs_demo.py"


@pytest.mark.parametrize(
    "config",
    [SHAPES, pytest.param("configs/camvid/semfpn_r18_ms_cs_6k.py", marks=pytest.mark.slow)],
)
def test_it_trains_resumes_and_evaluates(
    config: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The calls of that program, in its order."""
    if config != SHAPES:
        request.getfixturevalue("camvid")
    args = default_argument_parser().parse_args(
        [
            *("--config-file", str(ROOT / config), "--resume"),
            *SMALL_NETWORK,
            "model.backbone.pretrained=False",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            "dataloader.train.mapper.augmentations.crop_size=[64,64]",
            f"train.output_dir={tmp_path}",
            "train.max_iter=2",
            "train.checkpointer.period=1",
            "train.eval_period=2",
            "train.device=cpu",
        ]
    )
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    evaluated = []

    def evaluate(model: torch.nn.Module) -> dict:
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        evaluated.append(inference_on_dataset(model, loader, evaluator))
        return evaluated[-1]

    def train() -> torch.nn.Module:
        model = instantiate(cfg.model)
        model.to(cfg.train.device)
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        loader = instantiate(cfg.dataloader.train)
        model = create_ddp_model(model, **cfg.train.ddp)
        kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
        trainer = kind(model, loader, optimizer)
        checkpointer = DetectionCheckpointer(
            model, cfg.train.output_dir, optimizer=optimizer, trainer=trainer
        )
        trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
                hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
                hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(model)),
                hooks.PeriodicWriter(
                    default_writers(cfg.train.output_dir, cfg.train.max_iter),
                    period=cfg.train.log_period,
                ),
            ]
        )
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        has_checkpoint = args.resume and checkpointer.has_checkpoint()
        trainer.train(trainer.iter + 1 if has_checkpoint else 0, cfg.train.max_iter)
        return model

    model = train()
    assert 0 <= evaluated[-1]["sem_seg"]["mIoU"] <= 100
    assert "loss_contrast_res2_res5" in (tmp_path / "metrics.json").read_text()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    cfg.train.max_iter = 3
    assert any(not torch.equal(x, state[name]) for name, x in train().state_dict().items())
    del cfg.optimizer.params.model
    fresh = instantiate(cfg.model)
    DetectionCheckpointer(fresh).load(str(tmp_path / "model_0000001.pth"))
    assert all(torch.equal(x, state[name]) for name, x in fresh.state_dict().items())
