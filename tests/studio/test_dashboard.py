"""The dashboard of a training: what reaches the writers, when, and that it changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.events import TensorboardXWriter
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrast_d2.contrast import ContrastSum
from contrast_d2.engine import Trainer
from contrast_d2.engine.hooks import MetricsWriter
from contrast_d2.studio import dashboard as module
from contrast_d2.studio.dashboard import Dashboard

from ..tiny import NUM_CLASSES, tiny_contrast, tiny_segmentor

DATASET = "dashboard_of_a_test"
MetadataCatalog.get(DATASET).stuff_classes = [f"class {k}" for k in range(NUM_CLASSES)]


def batches() -> Iterator[list[dict[str, Any]]]:
    for i in itertools.count():
        generator = torch.Generator().manual_seed(i)
        yield [
            {
                "image": torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8, generator=generator),
                "sem_seg": torch.randint(NUM_CLASSES, (5, 6), generator=generator)
                .repeat_interleave(8, 0)
                .repeat_interleave(8, 1),
                "file_name": f"folder/image_{i}_{j}.png",
            }
            for j in range(3)
        ]


def train(
    folder: Path,
    period: int | None,
    contrast: torch.nn.Module | None,
    length: int = 6,
    **options: Any,
) -> Trainer:
    model = tiny_segmentor(contrast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, batches(), optimizer, seed=0, **options)
    if period:
        trainer.register_hooks([Dashboard(period, str(folder), DATASET)])
    writer = MetricsWriter(lambda: [TensorboardXWriter(str(folder))], 1, str(folder))
    trainer.register_hooks([writer])
    trainer.train(0, length)
    return trainer


def events(folder: Path) -> EventAccumulator:
    result = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    return result.Reload()


def test_tensorboard_shows_every_period(tmp_path: Path) -> None:
    torch.manual_seed(1)
    train(tmp_path, 2, tiny_contrast())
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {
        "dashboard/draws/res2",
        "dashboard/draws/res3",
        "dashboard/class_similarity",
        "dashboard/drawn_per_class",
    }
    assert set(found.Tags()["histograms"]) == {
        f"dashboard/{scale}/{sign}_similarity"
        for scale in ("res2", "res3")
        for sign in ("positive", "negative")
    }
    for name in found.Tags()["images"]:
        assert [image.step for image in found.Images(name)] == [1, 3, 5]
    for name in found.Tags()["histograms"]:
        rows = found.Histograms(name)
        assert [row.step for row in rows] == [1, 3, 5]
        for row in rows:
            value = row.histogram_value
            assert -1.001 < value.min < value.max < 1.001 and value.num > 100
            assert sum(value.bucket) == value.num and len(value.bucket) == 100
    # The files are the newest pictures.
    for name in found.Tags()["images"]:
        file = tmp_path / "dashboard" / f"{name.removeprefix('dashboard/').replace('/', '_')}.png"
        newest = found.Images(name)[-1]
        assert Image.open(file).size == (newest.width, newest.height)


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_the_last_batch_of_the_step_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches_per_step: int
) -> None:
    kept = []
    original = Dashboard._show

    def show(self: Dashboard, inspection: Any, batch: Any) -> None:
        kept.append((inspection, batch))
        original(self, inspection, batch)

    monkeypatch.setattr(Dashboard, "_show", show)
    train(tmp_path, 2, tiny_contrast(), length=2, accumulation_steps=batches_per_step)
    ((inspection, batch),) = kept
    last = 2 * batches_per_step - 1
    assert [x["file_name"] for x in batch] == [f"folder/image_{last}_{j}.png" for j in range(3)]
    assert torch.equal(inspection.labels, torch.stack([x["sem_seg"] for x in batch]))
    found = events(tmp_path)
    for term, similarities in inspection.similarities.items():
        values = similarities.positive.double().numpy()
        (row,) = found.Histograms(f"dashboard/{term}/positive_similarity")
        counts, _ = np.histogram(values, bins=100)
        assert np.abs(np.cumsum(row.histogram_value.bucket) - np.cumsum(counts)).max() <= 2
        assert row.histogram_value.sum == pytest.approx(values.sum(), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2}, {"amp_dtype": "bf16"}])
def test_a_training_is_the_same_with_it(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = []
    for period in (None, 1):
        torch.manual_seed(1)
        trainer = train(tmp_path, period, tiny_contrast(), length=3, **options)
        weights.append(trainer.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_other_iterations_have_no_inspection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contrast, seen = tiny_contrast(), []
    original = type(contrast).terms

    def contrasting(self: Any, *args: Any) -> Any:
        seen.append(self.inspection is not None)
        return original(self, *args)

    monkeypatch.setattr(type(contrast), "terms", contrasting)
    train(tmp_path, 3, contrast, length=7)
    assert seen == [False, False, True, False, False, True, False]
    assert contrast.inspection is None


def test_a_failed_step_leaves_no_inspection(tmp_path: Path) -> None:
    contrast = tiny_contrast()
    with torch.no_grad():
        contrast.projector.heads["res2"].get_parameter(
            next(name for name, _ in contrast.projector.heads["res2"].named_parameters())
        ).fill_(torch.inf)
    with pytest.raises(FloatingPointError):
        train(tmp_path, 1, contrast, length=1)
    assert contrast.inspection is None


def test_a_picture_that_cannot_be_drawn_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr(module, "similarity_figure", fail)
    with caplog.at_level("WARNING", "contrast_d2"):
        trainer = train(tmp_path, 3, tiny_contrast())
    assert trainer.iter == 6
    assert caplog.text.count("is not shown: no such font") == 2


def test_a_sum_of_methods_shows_each(tmp_path: Path) -> None:
    torch.manual_seed(1)
    contrast = ContrastSum({"one": tiny_contrast(), "two": tiny_contrast()})
    train(tmp_path, 1, contrast, length=1)
    assert {"dashboard/draws/one/res2", "dashboard/draws/two/res3"} <= set(
        events(tmp_path).Tags()["images"]
    )
    assert (tmp_path / "dashboard" / "draws_two_res3.png").is_file()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_shown_in_rgb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    shown = []

    def picture(images: Any, names: Any, *args: Any, **options: Any) -> np.ndarray:
        shown.append((images, names))
        return np.zeros((4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr(module, "draws_picture", picture)
    contrast = tiny_contrast()
    model = tiny_segmentor(contrast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, batches(), optimizer, seed=0)
    trainer.register_hooks([Dashboard(1, str(tmp_path), DATASET, image_format)])
    trainer.train(0, 1)
    images, names = shown[0]
    expected = next(batches())[0]["image"].permute(1, 2, 0).numpy()
    assert np.array_equal(images[0], expected if image_format == "RGB" else expected[..., ::-1])
    assert names == ["image_0_0", "image_0_1"]


def test_a_baseline_shows_nothing(tmp_path: Path) -> None:
    train(tmp_path, 1, None, length=1)
    assert not (tmp_path / "dashboard").exists()
