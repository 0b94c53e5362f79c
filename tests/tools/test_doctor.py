"""tools/doctor.py: each known breakage is named with what fixes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import install_detectron2
import pytest
from health import data, machine, software
from health.finding import ERROR, NOTE, OK, Answer, Finding, probe, satisfies
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/doctor.py"

# What the probe uses of torch; each part can be broken.
FAKE_TORCH = """
import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda="13.0", hip=None)
cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
class Tensor:
    def numpy(self):
        {numpy}
def zeros(*shape):
    return Tensor()
"""
FAKE_TORCHVISION = "import types\nops = types.SimpleNamespace(nms=lambda *arguments: None)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a module, found before the real one by this interpreter's probes."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, source: str = "", version: str = "1.0") -> None:
        file = site / name / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return install


@pytest.fixture
def install_torch(install) -> Callable[..., None]:
    """Installs a torch whose parts all work, but for those that are given."""

    def install_torch(
        version: str = "2.14.1", numpy: str = "pass", torchvision: str = "", tensorboard: str = ""
    ) -> None:
        install("torch", FAKE_TORCH.format(version=version, numpy=numpy), version)
        install("torch/utils")
        install("torch/utils/tensorboard", tensorboard or "SummaryWriter = None")
        install("torchvision", torchvision or FAKE_TORCHVISION, "0.29.1")

    return install_torch


def by_topic(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def torch_findings() -> dict[str, Finding]:
    return by_topic(software.check_torch(probe(software.PROBE)))


def test_a_torch_whose_parts_fit_is_ok(install_torch) -> None:
    install_torch()
    found = torch_findings()
    assert list(found) == ["torch", "numpy", "torchvision", "tensorboard"]
    assert {finding.state for finding in found.values()} == {OK}
    assert found["torch"].text == "torch 2.14.1."
    assert "torchvision 0.29.1 fits" in found["torchvision"].text


@pytest.mark.parametrize(
    ("source", "text", "command"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "not installed", "torch=="),
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "libcudart.so.13",
            "--force-reinstall torch==",
        ),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11", "--force-reinstall"),
    ],
)
def test_a_torch_that_cannot_be_imported(install, source: str, text: str, command: str) -> None:
    install("torch", source)
    (finding,) = torch_findings().values()
    assert finding.state == ERROR and text in finding.text
    assert command in finding.command and "torchvision==" in finding.command


def test_what_does_not_fit_torch_is_named_by_itself(install_torch) -> None:
    install_torch(
        version="2.2.0",
        numpy="raise RuntimeError('Numpy is not available')",
        torchvision="raise RuntimeError('operator torchvision::nms does not exist')",
        tensorboard="import pkg_resources_of_long_ago",
    )
    found = torch_findings()
    assert [finding.state for finding in found.values()] == [OK, ERROR, ERROR, ERROR]
    assert "Numpy is not available" in found["numpy"].text
    assert found["numpy"].command.endswith("-m pip install 'numpy<2'")
    assert "2.2.0" in found["torchvision"].text
    assert "pip install torch==" in found["torchvision"].command
    assert "no longer has" in found["tensorboard"].text
    assert "--upgrade tensorboard" in found["tensorboard"].command


@pytest.mark.parametrize(
    ("error", "text", "command"),
    [
        ("AttributeError(\"module 'PIL.Image' has no attribute 'LINEAR'\")", "Pillow 10", None),
        ("AttributeError(\"module 'numpy' has no attribute 'bool'\")", "numpy 1.24", None),
        ("ValueError('Unable to avoid copy while creating an array')", "numpy 2", None),
        ("ModuleNotFoundError(\"No module named 'pkg_resources'\")", "setuptools 82", None),
        ("ImportError('_C.so: undefined symbol: _ZN3c10')", "another torch or CUDA", None),
        ("ModuleNotFoundError(\"No module named 'hydra.core'\")", "needs hydra", "hydra-core"),
        ("RuntimeError('of another kind.')", "of another kind.", None),
    ],
)
def test_a_detectron2_that_is_broken(install, error: str, text: str, command: str | None) -> None:
    install("detectron2", f"raise {error}", "0.6")
    found = by_topic(software.check_detectron2(needs_operators=False))
    finding = found["detectron2"]
    assert finding.state == ERROR and text in finding.text and finding.text.count("..") == 0
    if command:
        assert finding.command.endswith(f"pip install {command}")
    else:
        # The installer refuses to replace what others have installed.
        assert "uninstall -y detectron2 && " in finding.command
        assert finding.command.endswith("tools/install_detectron2.py")


def test_a_detectron2_of_ours_that_is_broken_is_replaced(install) -> None:
    install("detectron2", "raise RuntimeError('of another kind.')", "0.6+purepython")
    finding = by_topic(software.check_detectron2(needs_operators=False))["detectron2"]
    assert finding.state == ERROR and "uninstall" not in finding.command
    assert finding.command.endswith("tools/install_detectron2.py")


@pytest.mark.parametrize(("pip", "refuses"), [("26.2.1", False), ("26.3", True), ("27.0", True)])
def test_a_pip_that_refuses_the_archive(
    install, pip: str, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pip", version=pip)
    nothing = install_detectron2.Detectron2(None, None, None, None)
    monkeypatch.setattr(install_detectron2, "find_detectron2", lambda: nothing)
    found = by_topic(software.check_detectron2(needs_operators=False))
    assert found["detectron2"].text == "detectron2 is not installed."
    assert ("pip" in found) == refuses
    if refuses:
        assert found["pip"].command.endswith("install 'pip<26.3'")


@pytest.mark.parametrize("compiled", [False, True])
def test_operators_are_an_error_where_they_are_asked_for(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("_C.cpython-311-x86_64-linux-gnu.so" if compiled else "_C.py")).touch()
    working = install_detectron2.Detectron2("0.6", str(tmp_path), "0.6", None)
    monkeypatch.setattr(install_detectron2, "find_detectron2", lambda: working)
    (finding,) = software.check_detectron2(needs_operators=False)
    assert finding.state == OK and ("pure Python" in finding.text) != compiled
    found = by_topic(software.check_detectron2(needs_operators=True))
    assert ("operators" in found) != compiled
    if not compiled:
        assert found["operators"].state == ERROR
        assert "--no-build-isolation git+" in found["operators"].command


def test_packages_and_extras(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("thing", version="1.9.3")
    extras = {"a": ["thing>=1"], "b": ["contrast_d2[a]", "gone"], "c": ["contrast_d2[a]"]}
    needed = ["thing>=1.10", "gone>=2.0", "torch_that_is_gone", "torch>=2"]
    monkeypatch.setattr(software, "requirements", lambda: (needed, extras))
    missing, old, *of_extras = software.check_packages()
    assert "gone, torch_that_is_gone" in missing.text
    assert missing.command.endswith("pip install 'gone>=2.0' torch_that_is_gone")
    assert "1.9.3" in old.text and "thing>=1.10" in old.text
    assert missing.state == old.state == ERROR
    assert [(finding.state, finding.text) for finding in of_extras] == [
        (OK, "installed: a, c."),
        (NOTE, "not installed, and needed for some tools only: b."),
    ]
    assert of_extras[1].command.endswith("pip install 'contrast_d2[b]'")
    known = software.version_of
    monkeypatch.setattr(
        software, "version_of", lambda name: None if name == "contrast_d2" else known(name)
    )
    in_place = list(software.check_packages())[-1].command
    assert in_place.endswith(f"pip install -e '{software.ROOT}[b]'")
    install("thing", version="1.10")
    monkeypatch.setattr(software, "requirements", lambda: (["thing>=1.10,<2"], {}))
    shutil.rmtree(Path(sys.path[0]) / "thing-1.9.3.dist-info")
    (finding,) = software.check_packages()
    assert finding.state == OK and "1" in finding.text


def test_bounds_of_versions(subtests: pytest.Subtests) -> None:
    for version, requirement, expected in [
        ("2.10.0+cu130", "torch>=2.9", True),
        ("2.9", "torch>=2.10", False),
        ("2.0", "torch>=2.0.0", True),
        ("26.3", "pip<26.3", False),
        ("26.2.9", "pip>=20,<26.3", True),
        ("0.1.5.post20221221", "fvcore>=0.1.5.post20221221", True),
        ("1.0", "yacs", True),
    ]:
        with subtests.test(version=version, requirement=requirement):
            assert satisfies(version, requirement) is expected


def gpu_facts(**changes) -> Answer:
    facts = {"cuda": "13.0", "rocm": None, "gpus": [], "warnings": []}
    return Answer({**facts, **changes}, None)


GPU = {"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0", "error": None}
SEEN = ["NVIDIA H200, 535.104, 143771 MiB"]


def test_gpus(monkeypatch, subtests: pytest.Subtests) -> None:
    for answer, seen, hidden, state, text, command in [
        (gpu_facts(gpus=[GPU]), SEEN, None, OK, "NVIDIA H200, 139.8 GiB", None),
        (gpu_facts(), [], None, NOTE, "no GPU: torch, built for CUDA 13.0", None),
        (gpu_facts(cuda=None), SEEN, None, NOTE, "does not use the GPU", "--force-reinstall torch"),
        (gpu_facts(), SEEN, "", NOTE, "CUDA_VISIBLE_DEVICES='' hides", "unset CUDA_VISIBLE"),
        (gpu_facts(), SEEN, "-1", NOTE, "hides the GPU", "unset CUDA_VISIBLE"),
        (
            gpu_facts(warnings=["The NVIDIA driver on your system is too old"]),
            SEEN,
            "0",
            ERROR,
            "finds no GPU, though the driver does (NVIDIA H200, 535.104, 143771 MiB): The NVIDIA "
            "driver on your system is too old. Update",
            "nvidia-smi",
        ),
        (
            gpu_facts(gpus=[{**GPU, "error": "no kernel image is available"}]),
            SEEN,
            None,
            ERROR,
            "cannot run this torch for CUDA 13.0: no kernel image",
            "--force-reinstall torch",
        ),
    ]:
        with subtests.test(hidden=hidden):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if hidden is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
            (finding,) = machine.check_gpus(answer, seen)
            assert finding.state == state and text in finding.text
            assert (finding.command is None) == (command is None)
            assert command is None or command in finding.command


def test_disks_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total free")
    sizes = {".": 100, "/dev/shm": 8}

    def disk_usage(path: str) -> usage:
        return usage(sizes[path] * 2**30, sizes[path] * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(machine.os.path, "isdir", lambda path: True)
    for name in machine._CACHES:
        monkeypatch.setenv(name, str(tmp_path / "not/yet/there"))
    found = by_topic(machine.check_disks("."))
    assert {topic: finding.state for topic, finding in found.items()} == {
        "disk": OK,
        "memory": OK,
        "caches": OK,
    }
    sizes.update({".": 3, "/dev/shm": 0.0625})
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file/huggingface"))
    found = by_topic(machine.check_disks("."))
    assert {finding.state for finding in found.values()} == {NOTE}
    assert "only 0.1 GiB of shared memory" in found["memory"].text
    assert found["caches"].command == "export HF_HOME=FOLDER"
    assert "TORCH_HOME" not in found["caches"].text
    sizes["."] = 0.1
    assert by_topic(machine.check_disks("."))["disk"].state == ERROR


def test_datasets_that_are_there_incomplete_and_absent(tmp_path: Path) -> None:
    root = str(tmp_path)
    for folder in ("camvid", "cityscapes", "mine"):
        (tmp_path / folder).mkdir()
    lacks = f"The dataset folder {root}/{{}} does not exist. Set DETECTRON2_DATASETS (now ...)"
    prepare = "has no label file x.png: run python tools/prepare_dataset.py cityscapes (datasets"
    answer = Answer(
        {
            "found": {"camvid_sem_seg_train": 1367, "camvid_sem_seg_val": 101},
            "failed": {
                "camvid_sem_seg_test": lacks.format("camvid/images/test"),
                "cityscapes_fine_sem_seg_train": f"The image {root}/cityscapes/a.png {prepare}",
                "cityscapes_fine_sem_seg_val": f"The image {root}/cityscapes/b.png {prepare}",
                "ade20k_sem_seg_train": lacks.format("ADEChallengeData2016/images/training"),
                "mine": f"{root}/mine/dataset.json: unknown entries ['clases']",
            },
            "file": "contrast_d2/__init__.py",
        },
        None,
    )
    there, part, unprepared, wrong, absent = data.check_datasets(answer, root)
    assert there.state == OK and all(x in there.text for x in ("camvid", "1,367", "101"))
    assert part.state == NOTE and "camvid" in part.text
    assert part.command.endswith("tools/check_dataset.py camvid")
    assert "cityscapes_fine" in unprepared.text and "2" in unprepared.text
    assert unprepared.command.endswith("tools/prepare_dataset.py cityscapes")
    assert "unknown entries" in wrong.text
    assert absent.text.startswith(f"not in {root}: ade20k;")

    (finding,) = data.check_datasets(answer, str(tmp_path / "nowhere"))
    assert finding.state == NOTE and finding.command == "export DETECTRON2_DATASETS=FOLDER"


def test_the_package_is_missing_or_broken() -> None:
    missing = Answer({}, "ModuleNotFoundError: No module named 'contrast_d2'")
    (finding,) = data.check_package(missing)
    assert finding.state == ERROR and finding.command.endswith(f"-e {ROOT}")
    (finding,) = data.check_package(Answer({}, "ImportError: x"))
    assert finding.state == ERROR and "ImportError: x" in finding.text


def test_the_report_and_the_exit_status(
    main, install, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    findings = [Finding("disk", OK, "Room."), Finding("gpu", NOTE, "None.", "buy one")]

    def examine(needs_operators: bool) -> list[Finding]:
        asked.append(needs_operators)
        return findings

    monkeypatch.setitem(main.__globals__, "examine", examine)
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python") and sys.executable in lines[0]
    assert lines[-5:] == [
        "ok     disk         Room.",
        "note   gpu          None.",
        "                    $ buy one",
        "",
        "all is well",
    ]
    findings.append(Finding("torch", ERROR, "Broken."))
    assert main(["--json", "--ops"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and asked == [False, True]
    assert report["environment"]["torch"].startswith("2.")
    assert report["checks"][1] == {
        "topic": "gpu",
        "state": "note",
        "text": "None.",
        "command": "buy one",
    }


def test_runs_in_a_python_that_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "empty", with_pip=False)
    interpreter = tmp_path / "empty/bin/python"
    done = subprocess.run(
        [str(interpreter), str(TOOL), "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == ""
    checks = json.loads(done.stdout)["checks"]
    broken = {check["topic"]: check for check in checks if check["state"] == "error"}
    assert list(broken) == ["torch", "packages", "detectron2", "pip", "contrast_d2"]
    assert all(check["command"].startswith(str(interpreter)) for check in broken.values())


@pytest.mark.slow
def test_this_environment_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("images", "annotations"):
        path = tmp_path / "mine" / folder / "val" / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(path)
    (tmp_path / "mine/dataset.json").write_text('{"classes": ["x"]}')
    (tmp_path / "camvid/images").mkdir(parents=True)
    done = subprocess.run([sys.executable, str(TOOL), "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    states = {check["topic"]: check["state"] for check in report["checks"]}
    for topic in ("python", "packages", "torch", "numpy", "torchvision", "tensorboard"):
        assert states[topic] == OK, topic
    assert states["detectron2"] == states["contrast_d2"] == OK
    texts = [check["text"] for check in report["checks"] if check["topic"] == "datasets"]
    assert "mine: images of val 1." in texts
    assert "shapes: images of train 256, val 64." in texts
    assert any(text.startswith("camvid is incomplete") for text in texts)
    assert any(text.startswith(f"not in {tmp_path}: ") and "ade20k" in text for text in texts)
    errors = [check for check in report["checks"] if check["state"] == ERROR]
    assert done.returncode == int(bool(errors)) and {check["topic"] for check in errors} <= {"disk"}
