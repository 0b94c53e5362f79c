"""Ablations: variants of an experiment over seeds, trained, compared and shown."""

from .cells import Cell, Failure, Found, examine, plan_cells, train_cells
from .definition import Ablation, Variant, read_definition
from .page import write_page
from .results import ablation_table, collect_results, plot_variants
from .zoo import model_zoo

__all__ = [
    "Ablation",
    "Cell",
    "Failure",
    "Found",
    "Variant",
    "ablation_table",
    "collect_results",
    "examine",
    "model_zoo",
    "plan_cells",
    "plot_variants",
    "read_definition",
    "train_cells",
    "write_page",
]
