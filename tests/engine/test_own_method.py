"""A contrast method of one's own: one class, and everything else is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Contrasts the pixels of one map with those of the same map and of another.
MODULE = """
from detectron2.config import LazyCall as L

from contrast_d2.contrast import (
    BalancedSampler, ContrastMethod, MultiScaleProjector, Side, Term
)
from contrast_d2.registries import CONTRAST_REGISTRY


class BothWays(ContrastMethod):
    def __init__(self, channels, num_classes, fine, deep, warmup_iters=0):
        super().__init__(
            MultiScaleProjector(channels, 8),
            num_classes,
            features=[fine, deep],
            names=["both_ways"],
            warmup_iters=warmup_iters,
        )
        self.sampler = BalancedSampler(num_classes)

    def terms(self, batch):
        (anchors,) = self.sample(batch, list(batch.maps), self.sampler)
        fine, deep = anchors.values()
        return [Term("both_ways", fine, [Side(fine), Side(deep)], temperature=0.1)]


@CONTRAST_REGISTRY.register()
def both_ways():
    return L(BothWays)(channels="${channels}", num_classes="${dataset.num_classes}")
"""
YAML = """
MODEL:
  META_ARCHITECTURE: ContrastiveSegmentor
  BACKBONE: {NAME: TimmBackbone, OPTIONS: {NAME: test_resnet}}
  SEM_SEG_HEAD: {NAME: FCNDecoder, NORM: BN, IN_FEATURES: [res2, res3], NUM_CLASSES: 9}
  CONTRAST: {NAME: both_ways, OPTIONS: {FINE: res2, DEEP: res5, WARMUP_ITERS: 1}}
DATASETS: {TRAIN: [shapes_sem_seg_val], TEST: [shapes_sem_seg_val]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 3, CHECKPOINT_PERIOD: 1000}
TRAIN: {LOG_PERIOD: 1}
OUTPUT_DIR: out
"""


def test_a_method_of_ones_own_is_trained(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(MODULE)
    (tmp_path / "my.yaml").write_text(YAML)
    command = [sys.executable, ROOT / "train_net.py", "--config-file", "my.yaml"]
    result = subprocess.run(
        [*command, "--import", "my_method.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    losses = [row["loss_contrast_both_ways"] for row in rows if "loss_contrast_both_ways" in row]
    # Warm-up, statistics and the rest come from the base class.
    assert losses[0] == 0 < min(losses[1:])
    assert rows[1]["contrast/both_ways/anchors"] > 0
    assert -1 <= rows[1]["contrast/both_ways/negative_similarity"] <= 1
