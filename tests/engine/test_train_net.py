"""The main job as a user runs it: real processes, on the generated shapes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from contrast_d2.engine import STOPPED, last_checkpoint, load_config, load_trained

ROOT = Path(__file__).parents[2]
CONFIG = "configs/shapes/semfpn_r18_ms_cs_demo.py"
MEMORY_CONFIG = "configs/shapes/semfpn_r18_pixel_memory_demo.py"
# Small enough to take seconds, with all parts of the real job in it.
SMALL = [
    "model.backbone.name=test_resnet",
    "model.sem_seg_head.fpn_channels=16",
    "model.sem_seg_head.conv_dims=32",
    "model.contrast.embed_dim=16",
    "dataloader.train.mapper.augmentations.crop_size=[64,64]",
    "dataloader.train.total_batch_size=4",
    "dataloader.test.num_workers=0",
    "train.accumulation_steps=2",
    "train.clip_norm=5.0",
    "train.ema_decay=0.9",
    "train.max_iter=8",
    "train.checkpointer.period=2",
    "train.eval_period=4",
    "train.log_period=1",
]

# A file that the backbone started from, and that is not there any more.
LOST_WEIGHTS = "model.backbone.weights_file=lost.pth"


def run(
    *arguments: str, script: str = "train_net.py", on_gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # what is promised bit for bit is so on the CPU
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def train(output_dir: Path, *extra: str, flags: tuple[str, ...] = (), config: str = CONFIG) -> None:
    arguments = ["--config-file", config, *flags, *SMALL, f"train.output_dir={output_dir}"]
    result = run(*arguments, *extra)
    assert result.returncode == 0, result.stderr[-3000:]


def kill(output_dir: Path, moment: str, iteration: int, *flags: str, config: str = CONFIG) -> None:
    result = run(
        moment,
        str(iteration),
        *("--config-file", config, *flags, *SMALL, f"train.output_dir={output_dir}"),
        script="tests/engine/killed_run.py",
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    leaves = {}
    for key, inner in items:
        leaves.update(flatten(inner, f"{prefix}/{key}"))
    return leaves


def assert_identical(a: Any, b: Any) -> None:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[path]), path
        else:
            assert value == b[path], path


def without_config(path: Path) -> dict[str, Any]:
    """A checkpoint but for the config, in which the folder is another one."""
    return {key: value for key, value in load(path).items() if key != "config"}


def metrics_rows(output_dir: Path) -> list[dict[str, float]]:
    lines = (output_dir / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(output_dir: Path) -> list[str]:
    """The rows as text, so that nan equals nan."""
    times = ("time", "data_time", "eta_seconds")
    rows = metrics_rows(output_dir)
    return [json.dumps({k: v for k, v in row.items() if k not in times}) for row in rows]


def last_metrics(output_dir: Path) -> dict[int, dict[str, float]]:
    """The metrics by iteration."""
    rows: dict[int, dict[str, float]] = {}
    for row in metrics_rows(output_dir):
        rows.setdefault(row["iteration"], {}).update(row)
    return rows


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nobody disturbed."""
    output_dir = tmp_path_factory.mktemp("whole")
    train(output_dir)
    return output_dir


def test_a_run_leaves_what_the_readme_promises(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert {
        "config.yaml",
        "metrics.json",
        "log.txt",
        "last_checkpoint",
        "model_final.pth",
        "model_best.pth",
        "model_inference.pth",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (whole_run / "last_checkpoint").read_text() == "model_final.pth"
    # checkpointer.max_to_keep is 2
    numbered = sorted(n for n in names if n.startswith("model_0"))
    assert numbered == ["model_0000005.pth", "model_0000007.pth"]
    metrics = last_metrics(whole_run)
    assert {"loss_sem_seg", "loss_contrast_res2", "loss_contrast_res2_res5", "grad_norm"} <= set(
        metrics[6]
    )
    assert metrics[6]["contrast/res2/anchors"] > 0
    assert metrics[4]["lr"] == pytest.approx(2e-3 * (1 - 4 / 8) ** 0.9)
    state = load(whole_run / "model_inference.pth")["model"]
    final = load(whole_run / "model_final.pth")
    assert set(final["model"]) - set(state) == {n for n in final["model"] if "contrast." in n}
    # What is evaluated and left is the average, and what training continues from are the weights.
    average = final["trainer"]["hooks"]["WeightAverage"]["average"]
    assert_identical(state, average)
    best = load(whole_run / "model_best.pth")
    assert_identical(
        best["trainer"]["hooks"]["WeightAverage"]["average"],
        {name: x for name, x in best["model"].items() if name in average},
    )
    cfg = load_config(str(whole_run / "config.yaml"))
    trained = load_trained(cfg, last_checkpoint(str(whole_run)), device="cpu")
    assert not trained.training
    assert_identical(average, trained.state_dict())
    name = next(name for name in state if name.endswith("conv1.weight"))
    assert not torch.equal(state[name], final["model"][name])


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_bit_identical(whole_run: Path, tmp_path: Path) -> None:
    kill(tmp_path, "step", 5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    kill(tmp_path, "write", 5, "--resume")
    assert [p.name for p in tmp_path.glob("*.tmp")]  # the torn file is there, under another name
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    kill(tmp_path, "tag", 5, "--resume")
    assert (tmp_path / "model_0000005.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    kill(tmp_path, "rename", 7, "--resume")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    restarts = json.loads((tmp_path / "run.json").read_text())["restarts"]
    assert [restart["iteration"] for restart in restarts] == [4, 4, 4]
    train(tmp_path, flags=("--resume",))
    assert not list(tmp_path.glob("*.tmp"))
    for name in ("model_final.pth", "model_best.pth", "model_inference.pth"):
        assert_identical(without_config(whole_run / name), without_config(tmp_path / name))
    assert without_times(whole_run) == without_times(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("model_0*")) == [
        "model_0000005.pth",
        "model_0000007.pth",
    ]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_run_stops_on_request_and_goes_on(
    number: signal.Signals, whole_run: Path, tmp_path: Path
) -> None:
    arguments = ["--config-file", CONFIG, *SMALL, f"train.output_dir={tmp_path}"]
    result = run(number.name, "4", *arguments, script="tests/engine/killed_run.py")
    assert result.returncode == STOPPED, result.stderr[-3000:]
    assert "Traceback" not in result.stdout + result.stderr
    last = (tmp_path / "last_checkpoint").read_text()
    assert last in ("model_0000004.pth", "model_0000005.pth")  # its own step, or the next one
    assert not (tmp_path / "owner.json").exists()
    train(tmp_path, flags=("--resume",))
    for name in ("model_final.pth", "model_best.pth", "model_inference.pth"):
        assert_identical(without_config(whole_run / name), without_config(tmp_path / name))
    assert without_times(whole_run) == without_times(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["getpid", "getppid"])
def test_two_processes_stop_together(whose: str, tmp_path: Path) -> None:
    """Where the signal goes to the second of them, and where it goes to their launcher."""
    module = tmp_path / "gets_signal.py"
    module.write_text(
        f"""
import os, signal
from detectron2.utils import comm
from contrast_d2.engine import Trainer

run_step = Trainer.run_step

def get_signal(self):
    if self.iter == 2 and comm.get_rank() == 1:
        os.kill(os.{whose}(), signal.SIGTERM)
    run_step(self)

Trainer.run_step = get_signal
"""
    )
    folder = tmp_path / "run"
    flags = ("--num-gpus", "2", "--import", str(module))
    # No step of 100 is the last before the signal arrives.
    settings = [*SMALL, "train.max_iter=100", "train.eval_period=0", f"train.output_dir={folder}"]
    result = run("--config-file", CONFIG, *flags, *settings)
    assert result.returncode == STOPPED, result.stderr[-3000:]
    assert "Traceback" not in result.stdout + result.stderr
    last = folder / (folder / "last_checkpoint").read_text()
    assert load(last)["trainer"]["iteration"] >= 2


def test_a_kill_in_an_evaluation_costs_no_step(whole_run: Path, tmp_path: Path) -> None:
    kill(tmp_path, "evaluation", 3)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    train(tmp_path, flags=("--resume",))
    assert "Starting training from iteration 4" in (tmp_path / "log.txt").read_text()
    for name in ("model_final.pth", "model_best.pth", "model_inference.pth"):
        assert_identical(without_config(whole_run / name), without_config(tmp_path / name))
    assert without_times(whole_run) == without_times(tmp_path)


def test_an_evaluation_that_fails_ends_no_training(tmp_path: Path) -> None:
    module = tmp_path / "fails.py"
    module.write_text(
        """
from contrast_d2.evaluation import SemSegEvaluator

def fail(self, inputs, outputs):
    raise ValueError("x.png: holds the value 77, which is no class.")

SemSegEvaluator.process = fail
"""
    )
    folder = tmp_path / "run"
    arguments = ["--config-file", CONFIG, *SMALL, f"train.output_dir={folder}"]
    result = run(*arguments[:2], "--import", str(module), *arguments[2:])
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the training is complete") and "x.png" in last
    assert "--eval-only" in last
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert (folder / "model_inference.pth").exists()
    assert [row["iteration"] for row in metrics_rows(folder)] == list(range(8))


def test_another_experiment_is_not_resumed(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    arguments = ["--config-file", CONFIG, "--resume", *SMALL, f"train.output_dir={tmp_path}"]
    result = run(*arguments, "optimizer.lr=0.5", "model.contrast.temperature=0.2")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    rows = result.stderr.strip().splitlines()
    assert any(row.startswith("  optimizer.lr=0.5, was 0.00") for row in rows)
    assert any(row.startswith("  model.contrast.temperature=0.2, was ") for row in rows)
    assert "train.resume_changes=[model.contrast.temperature, optimizer.lr]" in rows[-1]
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    del before["log.txt"], after["log.txt"]
    assert before == after
    # A longer training, and a rate that was meant, are taken up.
    longer = ["train.max_iter=10", "train.resume_changes=[optimizer.lr]", "optimizer.lr=0.5"]
    train(tmp_path, *longer, flags=("--resume",))
    metrics = last_metrics(tmp_path)
    assert metrics[9]["lr"] == pytest.approx(0.5 * (1 - 9 / 10) ** 0.9)
    saved = load_config(str(tmp_path / "config.yaml"))
    assert (saved.optimizer.lr, saved.train.max_iter) == (0.5, 10)


@pytest.mark.slow
def test_a_memory_bank_survives_a_kill(tmp_path: Path) -> None:
    # Warm-up ends, and the small rings are full, between the kill and the checkpoint before it.
    memory = [
        "model.contrast.warmup_iters=10",
        "model.contrast.memory.regions_per_class=4",
        "model.contrast.memory.pixels_per_class=50",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, *memory, config=MEMORY_CONFIG)
    kill(killed, "step", 5, *memory, config=MEMORY_CONFIG)
    assert (killed / "last_checkpoint").read_text() == "model_0000003.pth"
    train(killed, *memory, flags=("--resume",), config=MEMORY_CONFIG)
    final = [without_config(path / "model_final.pth") for path in (whole, killed)]
    assert_identical(*final)
    bank = {n.rpartition(".")[2]: x for n, x in final[0]["model"].items() if "memory" in n}
    regions, pixels = bank["filled"].split(9)
    assert (regions == 4).any() and (pixels > 10).any()
    assert bank["keys"].any(dim=1).sum() == bank["filled"].sum()
    metrics = last_metrics(whole)
    # Two batches make an iteration.
    assert "contrast/p2/anchors" not in metrics[4] and metrics[5]["contrast/p2/anchors"] > 0
    assert 0 < metrics[2]["contrast/bank_fill"] < metrics[6]["contrast/bank_fill"]
    log = (whole / "log.txt").read_text()
    assert all(size in log for size in ("9 classes", "4 regions", "50 pixels"))


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_loses_nothing(whole_run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for two checkpoints and a half.
    size = int(2.5 * (whole_run / "model_final.pth").stat().st_size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        result = run("--config-file", CONFIG, *SMALL, f"train.output_dir={disk}")
        assert result.returncode == 1
        assert "Traceback" not in result.stderr + result.stdout
        error = result.stderr.strip().splitlines()[-1]
        assert error.startswith(f"error: {disk}/model_") and "No space left on device" in error
        assert not list(disk.glob("*.tmp"))
        last = disk / (disk / "last_checkpoint").read_text()
        assert load(last)["trainer"]["iteration"] in (1, 3)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
        train(disk, flags=("--resume",))
        for name in ("model_final.pth", "model_best.pth", "model_inference.pth"):
            assert_identical(without_config(whole_run / name), without_config(disk / name))
        assert without_times(whole_run) == without_times(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_another_run_in_the_folder_is_not_continued(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    kill(tmp_path, "step", 1)  # a new run, not resumed, that gets no checkpoint of its own
    assert (tmp_path / "model_final.pth.old").exists()
    assert (tmp_path / "metrics.json.old").exists()
    train(tmp_path, "dataloader.train.num_workers=0", flags=("--resume",))
    assert "Starting training from iteration 0" in (tmp_path / "log.txt").read_text()
    assert without_times(whole_run) == without_times(tmp_path)


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_starts_anew(whole_run: Path, tmp_path: Path) -> None:
    kill(tmp_path, "write", 1)
    assert not (tmp_path / "last_checkpoint").exists()
    train(tmp_path, "dataloader.train.num_workers=0", flags=("--resume",))
    final = [without_config(path / "model_final.pth") for path in (whole_run, tmp_path)]
    assert_identical(*final)


@pytest.mark.parametrize(
    "weights", ["model_inference.pth", pytest.param("model_final.pth", marks=pytest.mark.slow)]
)
def test_eval_only_repeats_the_last_evaluation(whole_run: Path, weights: str) -> None:
    before = last_metrics(whole_run)[8]
    config = (whole_run / "config.yaml").read_text()
    result = run(
        *("--config-file", CONFIG, "--eval-only", *SMALL, f"train.output_dir={whole_run}"),
        f"train.init_checkpoint={whole_run / weights}",
        "model.contrast=None",
        LOST_WEIGHTS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads(
        (whole_run / "inference/shapes_sem_seg_val/sem_seg_evaluation.json").read_text()
    )
    assert f"{before['sem_seg/mIoU']:.4f}" in result.stdout + result.stderr
    assert before["sem_seg/mIoU"] in flatten(scores).values()
    assert (whole_run / "config.yaml").read_text() == config  # that of the training


@pytest.mark.slow
def test_a_resumed_run_does_not_need_what_it_started_from(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    train(tmp_path, LOST_WEIGHTS, flags=("--resume",))
    final = [without_config(path / "model_final.pth") for path in (whole_run, tmp_path)]
    assert_identical(*final)
    result = run(str(tmp_path), "--images", "1", script="tools/plot_run.py")
    assert result.returncode == 0, result.stderr[-3000:]
    result = run("--config-file", CONFIG, *SMALL, f"train.output_dir={tmp_path}", LOST_WEIGHTS)
    assert result.returncode == 1
    assert "error: weights_file=lost.pth" in result.stderr


@pytest.mark.slow
def test_two_processes_train_without_a_gpu(tmp_path: Path) -> None:
    train(tmp_path, "train.max_iter=2", "train.eval_period=0", flags=("--num-gpus", "2"))
    log = (tmp_path / "log.txt").read_text()
    assert "Rank of current process: 0. World size: 2" in log
    assert "Rank of current process: 1. World size: 2" in (tmp_path / "log.txt.rank1").read_text()
    assert last_metrics(tmp_path)[2]["sem_seg/mIoU"] >= 0
    state = load(tmp_path / "model_final.pth")
    assert state["iteration"] == 1
    assert not any(name.startswith("module.") for name in state["model"])


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["enabled=False", "dtype=bf16", "dtype=fp16"])
def test_the_same_command_trains_on_a_gpu(tmp_path: Path, amp: str) -> None:
    arguments = ["--config-file", CONFIG, *SMALL, f"train.output_dir={tmp_path}"]
    result = run(*arguments, "train.amp.enabled=True", f"train.amp.{amp}", on_gpu=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "max_mem: " in (tmp_path / "log.txt").read_text()  # which detectron2 says of a GPU
    assert last_metrics(tmp_path)[8]["sem_seg/mIoU"] >= 0


def test_a_mistake_gets_one_line(tmp_path: Path) -> None:
    """As `test_mistakes.py` has it of many, here of a real process."""
    result = run("--config-file", CONFIG, "dataset.num_classes=5", f"train.output_dir={tmp_path}")
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert line.startswith("error: dataset.num_classes=5")
    assert "Traceback" not in result.stderr + result.stdout


def test_a_mistake_inside_a_process_gets_one_line(tmp_path: Path) -> None:
    result = run("--config-file", CONFIG, "--eval-only", f"train.output_dir={tmp_path}")
    assert result.returncode == 1
    assert "error: " in result.stderr and str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_sample_is_named_in_one_line(tmp_path: Path) -> None:
    """The error crosses from a data worker; what reaches the user is the sentence alone."""
    module, missing = tmp_path / "broken.py", tmp_path / "no.png"
    module.write_text(
        f"""
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog

cfg = LazyConfig.load({str(ROOT / CONFIG)!r})
locals().update(cfg)
MetadataCatalog.get("broken_train").set(
    **{{k: getattr(MetadataCatalog.get("shapes_sem_seg_train"), k)
       for k in ("stuff_classes", "stuff_colors", "ignore_label")}}
)
if "broken_train" not in DatasetCatalog.list():
    DatasetCatalog.register("broken_train", lambda: [
        DatasetCatalog.get("shapes_sem_seg_train")[0] | {{"file_name": {str(missing)!r}}}
    ] * 4)
dataset.train = "broken_train"
"""
    )
    result = run("--config-file", str(module), *SMALL, f"train.output_dir={tmp_path / 'run'}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "no.png" in last


@pytest.mark.slow
def test_weights_that_do_not_fit_are_not_evaluated(whole_run: Path, tmp_path: Path) -> None:
    weights = f"train.init_checkpoint={whole_run / 'model_final.pth'}"
    arguments = ["--config-file", CONFIG, "--eval-only", f"train.output_dir={tmp_path}"]
    result = run(*arguments, *SMALL, weights, "model.backbone.name=resnet34")
    assert result.returncode == 1
    assert "error: " in result.stderr and "model_final.pth" in result.stderr
    result = run(*arguments, *SMALL, "train.init_checkpoint=no/such.pth")
    assert result.returncode == 1
    assert "error: train.init_checkpoint=no/such.pth" in result.stderr
    assert "Traceback" not in result.stderr
