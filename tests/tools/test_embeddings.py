"""tools/embeddings.py: what it writes of two checkpoints, twice the same, and mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from contrast_d2.engine import load_config
from contrast_d2.segmentor import inference_state_dict
from contrast_d2.studio.embeddings import study

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/embeddings.py"
CONFIG = str(ROOT / "configs/shapes/semfpn_r18_ms_cs_demo.py")
OVERRIDES = [*SMALL_NETWORK, "dataloader.test.num_workers=0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training's checkpoint, and what is left of another one's at test time."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for number, name in enumerate(("method", "bare")):
        torch.manual_seed(number)
        model = instantiate(load_config(CONFIG, OVERRIDES).model)
        state = model.state_dict() if name == "method" else inference_state_dict(model)
        found[name] = folder / name / "model_final.pth"
        found[name].parent.mkdir()
        torch.save({"model": state}, found[name])
    return found


def arguments(output: Path, *more: str, files: list[str]) -> list[str]:
    command = ["--config-file", CONFIG, "--output", str(output), "--images", "6"]
    command += ["--per-class", "12", "--per-image", "4", "--neighbours", "3", "--planes", "pca"]
    for file in files:
        command += ["--weights", file]
    return [*command, *more, *OVERRIDES]


def test_two_runs_write_the_same_files(main, weights, tmp_path: Path, capsys) -> None:
    pytest.importorskip("sklearn")
    files = [f"one={weights['method']}", str(weights["bare"])]
    for name in ("first", "second"):
        assert main(arguments(tmp_path / name, "--layer", "res3", files=files)) == 0
        out = capsys.readouterr().out
    first = tmp_path / "first"
    written = {path.name for path in first.iterdir()}
    assert written == {
        "embeddings.html",
        "embeddings.npz",
        "metrics.json",
        "pca.png",
        "similarity.png",
        "similarity_bare.csv",
        "similarity_one.csv",
        "suspects.csv",
    }
    # Which is of its day and commit.
    for name in written - {"metrics.json"}:
        content, again = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert content == again, name

    reports = [
        json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("first", "second")
    ]
    assert reports[0]["models"] == reports[1]["models"]
    report = reports[0]
    assert list(report["models"]) == ["one", "bare"] and report["images"] == 6
    assert {"command", "commit", "date", "machine", "versions"} <= set(report)
    assert max(report["pixels"].values()) == 12
    arrays = np.load(first / "embeddings.npz")
    count = sum(report["pixels"].values())
    assert arrays["embeddings one"].shape == arrays["embeddings bare"].shape
    assert len(arrays["embeddings one"]) == count == len(arrays["labels"])
    assert arrays["pca bare"].shape == (count, 2) and len(arrays["file_names"]) == 6
    # Different weights of one network: the same pixels, other embeddings.
    assert not np.allclose(arrays["embeddings one"], arrays["embeddings bare"])
    for model, scores in report["models"].items():
        accuracy = (arrays[f"predictions {model}"] == arrays["labels"]).mean()
        assert scores["prediction_accuracy"] == pytest.approx(accuracy, abs=1e-4)
        assert f"{scores['knn_miou']:.3f}" in out
    rows = list(csv.reader((first / "similarity_one.csv").open()))
    matrix = np.array([[float(v or "nan") for v in row[1:]] for row in rows[1:]])
    np.testing.assert_array_equal(matrix, matrix.T)
    assert [row[0] for row in rows[1:]] == rows[0][1:] == list(report["pixels"])
    suspects = list(csv.DictReader((first / "suspects.csv").open()))
    assert suspects and all(row["label"] != row["vote"] for row in suspects)
    leads = [float(row["vote_share"]) - float(row["label_share"]) for row in suspects]
    # Of shares that are written with three digits.
    assert all(a >= b - 0.002 for a, b in zip(leads[:-1], leads[1:], strict=True))


def test_embeddings_of_a_projector(main, weights, tmp_path: Path, capsys) -> None:
    pytest.importorskip("sklearn")
    layer = ("--layer", "contrast/res4", "--apart", "2")
    assert main(arguments(tmp_path, *layer, files=[str(weights["method"])])) == 0
    arrays = np.load(tmp_path / "embeddings.npz")
    assert arrays["embeddings method"].shape[1] == 256
    page = (tmp_path / "embeddings.html").read_text()
    assert "Neighbours are 3 pixels of other images, 2 or more away in the data." in page
    capsys.readouterr()
    assert main(arguments(tmp_path, *layer, files=[str(weights["bare"])])) == 1
    assert "contrast/res4" in capsys.readouterr().err


def test_mistakes_give_one_clear_line(main, weights, tmp_path: Path, capsys) -> None:
    method, output = str(weights["method"]), tmp_path / "new"
    for more, files, message in (
        ((), ["none.pth"], "there is no file none.pth"),
        ((), [method, method], "'method' is named twice"),
        ((), [f"a/b={method}"], "cannot be part of a file's name"),
        (("--planes", "pca,mds"), [method], "'mds' is none of"),
        (("--images", "1"), [method], "--images 1: needs 2 or more"),
        (("--neighbours", "900"), [method], "fewer than 900 neighbours"),
        (("--layer", "res9"), [method], "no layer 'res9'"),
        (("--per-class", "0"), [method], "per_class=0"),
        (("--seed", "-1"), [method], "seed=-1"),
    ):
        assert main(arguments(output, *more, files=files)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not output.exists() or not list(output.iterdir())


def test_a_missing_library_is_told_before_any_work(
    main, weights, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "find_spec", lambda module: None if module == "umap" else module)
    output = tmp_path / "new"
    more = ("--planes", "tsne,umap")
    assert main(arguments(output, *more, files=[str(weights["method"])])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: umap-learn") and "contrast_d2[embeddings]" in error
    assert not output.exists()
