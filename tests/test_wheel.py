"""The wheel holds all that a training needs, and is what a user installs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from contrast_d2.__main__ import main, programs
from contrast_d2.engine import load_config
from contrast_d2.resources import find_config, resource

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "train_net.py")
DEMO = "configs/shapes/semfpn_r18_ms_cs_demo.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files in the tree that it builds."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("contrast_d2", "configs", "tools"):
        shutil.copytree(ROOT / name, copy / name)
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    target = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.json", "*.js", "py.typed")
        for path in (ROOT / "contrast_d2").rglob(pattern)
    }
    experiments = {
        f"contrast_d2/share/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / "configs").rglob(pattern)
    }
    assert len(package) > 80 and len(experiments) > 150
    assert package | experiments <= names
    assert "contrast_d2/share/train_net.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    modules = [name for name in names if name.startswith("contrast_d2/share/tools/")]
    assert "contrast_d2/share/tools/install_detectron2.py" in modules
    # A program that needs the tests would end with an ImportError there.
    for name in modules:
        tree = (
            ast.parse(zipfile.ZipFile(wheel).read(name)) if name.endswith(".py") else ast.parse("")
        )
        found = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not [module for module in found if (module or "").split(".")[0] == "tests"], name


@pytest.mark.slow
def test_it_trains_the_demo_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(installed)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    # Before site-packages, which knows the checkout.
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(installed / "bin/contrast-d2"), *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = ["train.max_iter=3", "dataloader.train.total_batch_size=2", "train.eval_period=0"]
    run("train_net", "--config-file", DEMO, *overrides, "train.output_dir=run")
    assert (elsewhere / "run/model_final.pth").is_file()
    record = (elsewhere / "run/run.json").read_text()
    assert str(ROOT) not in record  # the checkout had no part in it

    assert "files in mine" in run("copy_configs", "mine")
    shutil.rmtree(installed / "contrast_d2/share/configs")
    copied = (elsewhere / "mine" / Path(DEMO).relative_to("configs")).read_text()
    (elsewhere / "mine/shapes/own.py").write_text(copied.replace("shapes/semfpn", "shapes/own"))
    run("train_net", "--config-file", "mine/shapes/own.py", *overrides, "train.output_dir=own")
    assert (elsewhere / "own/model_final.pth").is_file()


def test_programs_are_found_and_run_as_their_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert {"train_net", "install_detectron2", "plot_run", "check_dataset"} <= set(programs())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])

    def run(*arguments: str) -> tuple[object, str]:
        """The exit status, which an interpreter prints where it is a text, and the output."""
        monkeypatch.setattr(sys, "argv", ["contrast-d2", *arguments])
        try:
            main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    assert "copy_configs" in run("--help")[1]
    assert str(run("plot_runs")[0]).startswith("error: plot_runs")
    (tmp_path / "taken").mkdir()
    assert str(run("copy_configs", "taken")[0]).startswith("error: taken")
    status, text = run("install_detectron2", "--help")
    assert status == 0 and "--wheel" in text


def test_experiment_files_are_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(DEMO).train.max_iter == 500
    own = tmp_path / DEMO
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert find_config(DEMO) == DEMO  # one's own comes first
    assert find_config("shapes/none.py") == "shapes/none.py"
    with pytest.raises(ValueError, match="configs/none.py: there is no such file"):
        load_config("configs/none.py")


def test_a_resource_beside_another_package_is_not_ours(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("contrast_d2.resources.PACKAGE", tmp_path / "contrast_d2")
    (tmp_path / "tools").mkdir()
    with pytest.raises(ValueError, match="tools did not come with contrast_d2"):
        resource("tools")
    (tmp_path / "setup.py").touch()
    assert resource("tools") == tmp_path / "tools"
