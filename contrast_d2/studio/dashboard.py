"""The hook that shows what the contrast does while it trains."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from ..contrast import DrawnPixels, Inspection
from ..files import write_durably
from .dashboard_pictures import (
    bars_figure,
    class_counts,
    draws_picture,
    figure_pixels,
    similarity_figure,
)

logger = logging.getLogger(__name__)

# Images of the batch that are shown, and bins of the histograms.
_SHOWN, _BINS = 2, 100


class Dashboard(HookBase):
    """Shows every so many iterations what the contrast method drew, and how similar that is.

    The pictures are of the last batch of the step and of this process. They go to the event
    storage, from where TensorBoard's and other writers take them:

    * `dashboard/draws/<scale>`: the drawn pixels on the first images;
    * `dashboard/class_similarity`: mean similarities by classes, one matrix for each term;
    * `dashboard/drawn_per_class` and `dashboard/bank_fill`: bars by class;
    * histograms `dashboard/<term>/positive_similarity` and `negative_similarity`.

    The newest picture of each kind is also a file in `<output_dir>/dashboard`. The step is the one
    of the training: no number of it, nor any random one, is changed. In all other steps nothing
    is computed, nor for a model without contrast. What cannot be drawn or written is logged. To be
    registered before the hook that writes
    metrics.

    Args:
        period: in iterations, 1 or more.
        output_dir: folder of the run.
        dataset: a registered dataset, or several with the same classes, for the names of these.
        image_format: order of the channels of the training images, "RGB" or "BGR".
    """

    def __init__(
        self,
        period: int,
        output_dir: str,
        dataset: str | Sequence[str],
        image_format: str = "RGB",
    ) -> None:
        self._period = period
        self._folder = os.path.join(output_dir, "dashboard")
        name = dataset if isinstance(dataset, str) else dataset[0]
        self._class_names: list[str] = MetadataCatalog.get(name).stuff_classes
        self._image_format = image_format

    @property
    def _contrast(self) -> Any:
        """The method, or sum of methods, of the trainer's model; None for a baseline."""
        model = self.trainer.model  # pyright: ignore[reportAttributeAccessIssue]
        wrapped = isinstance(model, DistributedDataParallel)
        return getattr(model.module if wrapped else model, "contrast", None)

    def _looks(self) -> bool:
        """Whether this step is shown."""
        return (self.trainer.iter + 1) % self._period == 0 and self._contrast is not None

    def before_step(self) -> None:
        if self._looks():
            self._contrast.inspection = Inspection(len(self._class_names))

    def after_step(self) -> None:
        if self._looks():
            inspection, self._contrast.inspection = self._contrast.inspection, None
            try:
                self._show(inspection, self.trainer.last_batch)  # pyright: ignore[reportAttributeAccessIssue]
            except Exception as error:  # a picture costs no training
                logger.warning("iteration %d is not shown: %s", self.trainer.iter, error)

    def after_train(self) -> None:
        if self._contrast is not None:
            self._contrast.inspection = None  # after a step that failed

    def _show(self, inspection: Inspection, batch: Sequence[dict[str, Any]]) -> None:
        os.makedirs(self._folder, exist_ok=True)
        for term, similarities in inspection.similarities.items():
            for sign, values in zip(("positive", "negative"), similarities[:2], strict=True):
                values = values[values.isfinite()].cpu()
                if len(values):
                    name = f"dashboard/{term}/{sign}_similarity"
                    self.trainer.storage.put_histogram(name, values, bins=_BINS)
        for scale, draws in inspection.draws.items():
            self._put_picture(f"draws/{scale}", self._draws_picture(inspection, draws, batch))
        if inspection.similarities:
            figure = similarity_figure(inspection, self._class_names)
            self._put_picture("class_similarity", figure_pixels(figure))
        self._put_bars("drawn_per_class", class_counts(inspection), "pixels in the batch")
        fills = {
            ring: {"filled": 100 * shares.cpu().numpy()}
            for ring, shares in inspection.bank_fill.items()
        }
        self._put_bars("bank_fill", fills, "slots that are filled (%)")
        # A figure is a knot of cycles and holds some MiB; Python would look for it after many more.
        gc.collect()

    def _draws_picture(
        self,
        inspection: Inspection,
        draws: Mapping[Any, DrawnPixels],
        batch: Sequence[dict[str, Any]],
    ) -> np.ndarray:
        shown = batch[:_SHOWN]
        images = [x["image"].permute(1, 2, 0).cpu().numpy() for x in shown]
        if self._image_format == "BGR":
            images = [image[..., ::-1] for image in images]
        names = [Path(x.get("file_name", "image")).stem for x in shown]
        return draws_picture(
            images, names, inspection.labels, draws, num_classes=inspection.num_classes
        )

    def _put_bars(
        self, name: str, values: Mapping[str, Mapping[str, np.ndarray]], label: str
    ) -> None:
        if values:
            self._put_picture(name, figure_pixels(bars_figure(values, self._class_names, label)))

    def _put_picture(self, name: str, picture: np.ndarray) -> None:
        """Hands a picture (H, W, 3) to the writers, and to a file."""
        self.trainer.storage.put_image(f"dashboard/{name}", picture.transpose(2, 0, 1))
        path = os.path.join(self._folder, name.replace("/", "_") + ".png")
        write_durably(path, lambda file: Image.fromarray(picture).save(file, format="png"))
