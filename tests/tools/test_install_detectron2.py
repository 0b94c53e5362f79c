"""tools/install_detectron2.py, run as users run it: a real pip, a real archive, a real environment.

The environment is a venv that sees the packages of the one that runs the tests, except detectron2.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
VERSION = "0.6+purepython.2"
HIDDEN = ("detectron2", "contrast_d2", "__editable__", "__pycache__")

# What the project does with detectron2, and the behaviour of the stand-in for compiled operators.
USE = """
import numpy as np, torch
import detectron2
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.layers import ShapeSpec
from detectron2.layers.mask_ops import paste_mask_in_image_old
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.projects.deeplab import DeepLabV3PlusHead
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils.collect_env import collect_env_info
assert detectron2.__version__ == "0.6", detectron2.__version__
assert polygons_to_bitmask([], 2, 3).dtype == np.bool_
pasted = paste_mask_in_image_old(torch.ones(4, 4), torch.tensor([0.0, 0.0, 8.0, 8.0]), 8, 8, 0.5)
assert pasted.sum() > 0
assert "pure-Python build" in collect_env_info()
from detectron2 import _C
assert not hasattr(_C, "__wrapped__")
try:
    _C.nms_rotated
except ImportError as error:
    assert "nms_rotated" in str(error)
else:
    raise AssertionError("a compiled operator is there")
print(detectron2.__file__)
"""


class Environment:
    """A venv whose only own packages are those that a test puts there."""

    def __init__(self, root: Path):
        self.root = root
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.python = root / "venv" / "bin" / "python"
        paths = {"base": str(root / "venv"), "platbase": str(root / "venv")}
        self.site = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
        self.shared = root / "shared"
        self.shared.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(HIDDEN) and entry.suffix != ".pth":
                (self.shared / entry.name).symlink_to(entry)
        (self.site / "shared.pth").write_text(f"{self.shared}\n")

    def snapshot(self) -> dict[str, int]:
        files = (p for p in self.site.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {str(p.relative_to(self.site)): p.stat().st_mtime_ns for p in files}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
        # The machine's own pip configuration must not bring an index or a folder back.
        environ.update(PIP_CONFIG_FILE=os.devnull, PIP_NO_COMPILE="1", OMP_NUM_THREADS="1")
        environ.update(variables)
        return subprocess.run(
            [str(self.python), *command], env=environ, cwd=self.root, capture_output=True, text=True
        )

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(SCRIPT), *arguments, **variables)


def only_this_folder(folder: Path) -> dict[str, str]:
    """pip's settings for a machine without a network whose packages lie in a folder."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary=pb1-detectron2", "pb1-detectron2==0.6", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "direct URL dependencies" in done.stderr:
        pytest.skip(f"pip does not download detectron2's source archive here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return folder / "pb1-detectron2-0.6.tar.gz"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = Environment(tmp_path_factory.mktemp("wheel"))
    before = environment.snapshot()
    done = environment.install("--wheel", "wheels/deep", **only_this_folder(archive.parent))
    assert done.returncode == 0, done.stderr
    assert environment.snapshot() == before
    path = environment.root / done.stdout.strip()
    assert path == environment.root / f"wheels/deep/detectron2-{VERSION}-py3-none-any.whl"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path


def assert_refused(
    done: subprocess.CompletedProcess[str], environment: Environment, before: dict, *words: str
) -> None:
    """One line on stderr that says what is wrong, and nothing else happened."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert environment.snapshot() == before


def test_wheel_is_complete_and_changed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    info = f"detectron2-{VERSION}.dist-info"
    rows = list(csv.reader(io.StringIO(files[f"{info}/RECORD"].decode())))
    assert sorted(row[0] for row in rows) == sorted(files)
    for name, digest, size in rows:
        if name != f"{info}/RECORD":
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
            assert (digest, int(size)) == ("sha256=" + sha256.rstrip("="), len(files[name]))
    assert b"Apache License" in files[f"{info}/LICENSE"]
    assert f"Name: detectron2\nVersion: {VERSION}\n".encode() in files[f"{info}/METADATA"]

    removed = {("np", n) for n in ("bool", "int", "float", "str", "object")} | {("Image", "LINEAR")}
    kept = set()
    for name, data in files.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(data)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) not in removed, name
                    kept.add((node.value.id, node.attr))
    assert {("np", "int64"), ("np", "float32"), ("Image", "BILINEAR")} <= kept
    for module in (
        "deeplab/semantic_seg",
        "point_rend/point_head",
        "panoptic_deeplab/panoptic_seg",
    ):
        assert f"detectron2/projects/{module}.py" in files
    changed = [n for n, data in files.items() if b"# Changed by install_detectron2.py" in data]
    assert "detectron2/evaluation/sem_seg_evaluation.py" in changed
    assert "detectron2/modeling/backbone/fpn.py" not in changed


@pytest.mark.slow
def test_install_use_repair_and_uninstall(archive: Path, environment: Environment) -> None:
    before = environment.snapshot()
    done = environment.install(**only_this_folder(archive.parent))
    assert done.returncode == 0, done.stderr
    assert f"installed detectron2 {VERSION}" in done.stdout
    used = environment.run("-c", USE)
    assert used.returncode == 0, used.stderr
    assert Path(used.stdout.strip()).is_relative_to(environment.site)
    assert f"detectron2=={VERSION}" in environment.run("-m", "pip", "freeze").stdout.split()

    # A second run has nothing to do, and needs no archive to see that.
    installed = environment.snapshot()
    done = environment.install(**only_this_folder(environment.root))
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout
    assert environment.snapshot() == installed

    # An installation of its own that lost a file is replaced.
    (environment.site / "detectron2" / "modeling" / "__init__.py").unlink()
    done = environment.install("--from", str(archive))
    assert done.returncode == 0, done.stderr
    assert environment.snapshot().keys() == installed.keys()

    removed = environment.run("-m", "pip", "uninstall", "-y", "-q", "detectron2")
    assert removed.returncode == 0, removed.stderr
    assert environment.snapshot() == before
    assert not (environment.site / "detectron2").exists()


def test_from_archive_and_checkout_give_the_same_wheel(
    archive: Path, wheel: Path, environment: Environment
) -> None:
    # Neither torch nor pip takes part in this.
    (environment.site / "shared.pth").unlink()
    expected = wheel.read_bytes()
    with tarfile.open(archive) as opened:
        opened.extractall(environment.root, filter="data")
    checkout = environment.root / "pb1-detectron2-0.6"
    zipped = shutil.make_archive(str(environment.root / "main"), "zip", checkout)
    for number, source in enumerate((archive, checkout, zipped)):
        done = environment.install("--from", str(source), "--wheel", str(number))
        assert done.returncode == 0, done.stderr
        assert (environment.root / done.stdout.strip()).read_bytes() == expected


def test_from_newer_source_that_needs_no_fix(
    archive: Path, wheel: Path, environment: Environment
) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(environment.root, filter="data")
    checkout = environment.root / "pb1-detectron2-0.6"
    with zipfile.ZipFile(wheel) as opened:
        names = [n for n in opened.namelist() if n.startswith("detectron2/")]
        opened.extractall(checkout, [n for n in names if not n.startswith("detectron2/projects/")])
    init = checkout / "detectron2" / "__init__.py"
    init.write_text(init.read_text().replace('"0.6"', '"0.7+cu130"'))
    done = environment.install("--from", str(checkout), "--wheel", "wheels")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("detectron2-0.7+cu130.purepython.2-py3-none-any.whl")


def test_wrong_checksum(archive: Path, environment: Environment) -> None:
    folder = environment.root / "index"
    folder.mkdir()
    tampered = folder / archive.name
    ran = environment.root / "setup.py.ran"
    with tarfile.open(archive) as source, tarfile.open(tampered, "w:gz") as target:
        for member in source:
            data = source.extractfile(member).read() if member.isfile() else b""
            if member.name.endswith("/setup.py"):
                data += f"\nopen({str(ran)!r}, 'w').close()\n".encode()
                member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256(tampered.read_bytes()).hexdigest()
    before = environment.snapshot()
    done = environment.install(**only_this_folder(folder))
    assert_refused(done, environment, before, "wrong checksum", digest)
    assert not ran.exists()


def test_unknown_content_under_the_expected_name(archive: Path, environment: Environment) -> None:
    """A 0.6 in which a fix has nothing to change is not what the script was written for."""
    script = environment.root / "install_detectron2.py"
    folder = environment.root / "index"
    folder.mkdir()
    other = folder / archive.name
    with tarfile.open(archive) as source, tarfile.open(other, "w:gz") as target:
        for member in source:
            data = source.extractfile(member).read() if member.isfile() else b""
            data = data.replace(b"Image.LINEAR", b"Image.LINE_R")
            target.addfile(member, io.BytesIO(data))
    known = hashlib.sha256(archive.read_bytes()).hexdigest()
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    text = SCRIPT.read_text()
    assert known in text
    script.write_text(text.replace(known, digest))
    before = environment.snapshot()
    done = environment.run(str(script), **only_this_folder(folder))
    assert_refused(done, environment, before, "fix 1 (Image.LINEAR) found nothing to change")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("torch", ("torch is not installed", "requirements/pinned.txt")),
        ("pip", ("pip is not installed", "ensurepip")),
        ("setuptools", ("setuptools is not installed",)),
    ],
)
def test_missing_tool(environment: Environment, missing: str, words: tuple[str, ...]) -> None:
    (environment.shared / missing).unlink()
    before = environment.snapshot()
    assert_refused(environment.install(), environment, before, *words)


def test_missing_dependency_is_seen_before_installing(
    archive: Path, environment: Environment
) -> None:
    (environment.shared / "fvcore").unlink()
    before = environment.snapshot()
    done = environment.install("--from", str(archive))
    assert_refused(done, environment, before, "No module named 'fvcore'", "not installed")


@pytest.mark.parametrize("network", ["none", "refused"])
def test_no_network(environment: Environment, network: str) -> None:
    settings = {
        "none": only_this_folder(environment.root),
        "refused": {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"},
    }[network]
    before = environment.snapshot()
    done = environment.install(**settings)
    assert_refused(done, environment, before, "pb1-detectron2==0.6", "no network", "--from")


def test_foreign_detectron2_is_left_alone(archive: Path, environment: Environment) -> None:
    package = environment.site / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('half\\nbuilt')\n")
    before = environment.snapshot()
    for arguments in ((), ("--from", str(archive))):
        done = environment.install(*arguments, **only_this_folder(archive.parent))
        assert_refused(done, environment, before, "half built", "pip uninstall detectron2")


@pytest.mark.parametrize("kind", ["nowhere", "empty", "no_projects", "text", "truncated", "unsafe"])
def test_from_what_is_no_source(archive: Path, environment: Environment, kind: str) -> None:
    source = environment.root / kind
    words = {
        "nowhere": "does not exist",
        "empty": "no detectron2/__init__.py",
        "no_projects": "no projects/DeepLab/deeplab",
        "text": "neither a folder nor",
        "truncated": "cannot be read",
        "unsafe": "unsafe member",
    }[kind]
    if kind == "empty":
        source.mkdir()
    elif kind == "no_projects":
        (source / "detectron2").mkdir(parents=True)
        (source / "detectron2" / "__init__.py").write_text('__version__ = "0.6"\n')
    elif kind == "text":
        source.write_text("detectron2")
    elif kind == "truncated":
        data = archive.read_bytes()
        source.write_bytes(data[: len(data) // 2])
    elif kind == "unsafe":
        with tarfile.open(source, "w:gz") as opened:
            for name in ("detectron2/__init__.py", "detectron2/../../outside.py"):
                opened.addfile(tarfile.TarInfo(name), io.BytesIO())
    before = environment.snapshot()
    done = environment.install("--from", str(source))
    assert_refused(done, environment, before, str(source) if kind != "unsafe" else "outside", words)
    assert not (environment.root.parent / "outside.py").exists()


def test_wheel_folder_that_cannot_be_written(archive: Path, environment: Environment) -> None:
    (environment.root / "file").write_text("")
    before = environment.snapshot()
    done = environment.install("--from", str(archive), "--wheel", "file/wheels")
    assert_refused(done, environment, before, "cannot write the wheel", "file/wheels")
