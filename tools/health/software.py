"""Python, torch, torchvision, detectron2 and the other packages, and whether they fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import install_detectron2

from .finding import (
    ERROR,
    NOTE,
    OK,
    ROOT,
    Answer,
    Finding,
    one_line,
    pinned,
    pip,
    python,
    release,
    satisfies,
    version_of,
)

_LEAST_PYTHON, _LEAST_PYTHON_OF_PINS = (3, 10), (3, 11)
# The first pip that refuses the archive of detectron2 0.6, whose extra names a URL.
_PIP_REFUSES = (26, 3)
_INSTALLER = str(ROOT / "tools/install_detectron2.py")

# Importing torch, using it with numpy, torchvision and TensorBoard; each by itself.
PROBE = """
import json, warnings
facts = {}
import torch
facts["version"] = torch.__version__
facts["cuda"] = torch.version.cuda
facts["rocm"] = getattr(torch.version, "hip", None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    facts["available"] = torch.cuda.is_available()
facts["warnings"] = [str(w.message) for w in caught]
facts["gpus"] = []
for i in range(torch.cuda.device_count() if facts["available"] else 0):
    gpu = {"name": "GPU %d" % i, "error": None}
    try:
        properties = torch.cuda.get_device_properties(i)
        gpu["name"] = properties.name
        gpu["memory_gib"] = round(properties.total_memory / 2**30, 1)
        gpu["capability"] = "%d.%d" % (properties.major, properties.minor)
        (torch.ones(2, device="cuda:%d" % i) + 1).sum().item()
    except Exception as error:
        gpu["error"] = str(error)
    facts["gpus"].append(gpu)

def tried(name, function):
    try:
        function()
        facts[name] = None
    except BaseException as error:
        facts[name] = "%s: %s" % (type(error).__name__, error)

def numpy():
    torch.zeros(1).numpy()

def torchvision():
    import torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)

def tensorboard():
    from torch.utils.tensorboard import SummaryWriter

for function in (numpy, torchvision, tensorboard):
    tried(function.__name__, function)
print(json.dumps(facts))
"""


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    version = sys.version_info[:3]
    text = "Python " + ".".join(map(str, version))
    if version < _LEAST_PYTHON:
        yield Finding("python", ERROR, f"{text} is too old: 3.10 or newer is needed.",
                      "make setup PYTHON=python3.12")  # fmt: skip
    elif version < _LEAST_PYTHON_OF_PINS:
        yield Finding("python", NOTE, f"{text} works; the pinned packages, of make, need 3.11.",
                      "make setup PYTHON=python3.12")  # fmt: skip
    else:
        yield Finding("python", OK, f"{text}.")


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What pyproject.toml asks for, and its extras; of the installed package on Python 3.10."""
    try:
        import tomllib

        with open(ROOT / "pyproject.toml", "rb") as file:
            project = tomllib.load(file)["project"]
        return project["dependencies"], project["optional-dependencies"]
    except (ImportError, OSError, KeyError, ValueError):
        pass
    try:
        lines = metadata.requires("contrast_d2") or []
    except metadata.PackageNotFoundError:
        return [], {}
    extras: dict[str, list[str]] = {}
    for line in lines:
        if match := re.search(r"extra\s*==\s*[\"']([\w-]+)", line):
            extras.setdefault(match[1], []).append(line.partition(";")[0].strip())
    return [line for line in lines if "extra ==" not in line], extras


def check_packages() -> Iterator[Finding]:
    """What the project depends on, by the versions that are installed."""
    needed, extras = requirements()
    lacking, old = [], []
    for requirement in needed:
        version = version_of(_name(requirement))
        if version is None:
            if _name(requirement) not in ("torch", "torchvision"):  # check_torch tells of them
                lacking.append(requirement)
        elif not satisfies(version, requirement):
            old.append((requirement, version))
    if lacking:
        names = ", ".join(map(_name, lacking))
        yield Finding("packages", ERROR, f"not installed: {names}.", pip("install", *lacking))
    for requirement, version in old:
        text = f"{_name(requirement)} is {version}, but {requirement} is needed."
        yield Finding("packages", ERROR, text, pip("install", requirement))
    if needed and not lacking and not old:
        yield Finding("packages", OK, f"all {len(needed)} that are needed are installed.")
    extras = {name: wanted for name, wanted in extras.items() if name != "dev"}
    absent = sorted(name for name, wanted in extras.items() if not _has(name, wanted, extras))
    present = sorted(set(extras) - set(absent))
    if present:
        yield Finding("extras", OK, f"installed: {', '.join(present)}.")
    if absent:
        # Of a package that is installed pip looks for what its extras lack, and for nothing else.
        place = ["contrast_d2"] if version_of("contrast_d2") else ["-e", str(ROOT)]
        place[-1] += f"[{','.join(absent)}]"
        text = f"not installed, and needed for some tools only: {', '.join(absent)}."
        yield Finding("extras", NOTE, text, pip("install", *place))


def _name(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]


def _has(extra: str, wanted: list[str], extras: dict[str, list[str]]) -> bool:
    """Whether all of an extra is installed, and of the extras that it takes in."""
    for requirement in wanted:
        if _name(requirement) == "contrast_d2":
            inner = re.search(r"\[([\w,-]+)\]", requirement)
            names = inner[1].split(",") if inner else []
            if not all(_has(name, extras.get(name, []), extras) for name in names):
                return False
            continue
        version = version_of(_name(requirement))
        if version is None or not satisfies(version, requirement):
            return False
    return True


def check_torch(answer: Answer) -> Iterator[Finding]:
    """torch, and whether numpy, torchvision and TensorBoard work with it.

    Args:
        answer: of `PROBE`.
    """
    pair = pip("install", *pinned("torch", "torchvision"))
    if answer.error is not None:
        if "No module named 'torch'" in answer.error:
            yield Finding("torch", ERROR, "torch is not installed.", pair)
        else:
            text = f"torch cannot be imported: {answer.error}."
            yield Finding(
                "torch", ERROR, text, pair.replace("install", "install --force-reinstall")
            )
        return
    facts = answer.values
    yield Finding("torch", OK, f"torch {facts['version']}.")
    if facts["numpy"]:
        text = (
            f"torch {facts['version']} does not work with numpy {version_of('numpy')} "
            f"({one_line(facts['numpy'])})."
        )
        numpy = "numpy<2" if release(facts["version"]) < (2, 3) else pinned("numpy")[0]
        yield Finding("numpy", ERROR, text, pip("install", numpy))
    else:
        yield Finding("numpy", OK, f"numpy {version_of('numpy')} works with torch.")
    yield _torchvision(facts, pair)
    yield _tensorboard(facts["tensorboard"])


def _torchvision(facts: dict, pair: str) -> Finding:
    error = facts["torchvision"]
    if not error:
        return Finding("torchvision", OK, f"torchvision {version_of('torchvision')} fits torch.")
    if "No module named 'torchvision'" in error:
        return Finding("torchvision", ERROR, "torchvision is not installed.", pair)
    text = (
        f"torchvision {version_of('torchvision')} is built for another torch than "
        f"{facts['version']} ({one_line(error)})."
    )
    return Finding("torchvision", ERROR, text, pair)


def _tensorboard(error: str | None) -> Finding:
    if not error:
        return Finding("tensorboard", OK, f"tensorboard {version_of('tensorboard')} works.")
    if "pkg_resources" in error:
        text = (
            f"tensorboard {version_of('tensorboard')} needs pkg_resources, which setuptools "
            f"{version_of('setuptools')} no longer has."
        )
        return Finding("tensorboard", ERROR, text, pip("install", "--upgrade", "tensorboard"))
    text = f"TensorBoard's writer, which trainings log with, cannot be imported: {one_line(error)}."
    return Finding("tensorboard", ERROR, text, pip("install", *pinned("tensorboard")))


# Why a detectron2 fails here: a pattern of its error, and the sentence for it.
_BREAKAGES = (
    (r"LINEAR", "it uses Image.LINEAR, which Pillow 10 removed (here is {Pillow})"),
    (
        r"numpy.* has no attribute '(bool|int|float|str|object)'",
        "it uses names that numpy 1.24 removed (here is {numpy})",
    ),
    (
        r"Unable to avoid copy|copy=False",
        "it uses np.array(copy=False), which numpy 2 changed (here is {numpy})",
    ),
    (
        r"pkg_resources",
        "it imports pkg_resources, which setuptools 82 removed (here is {setuptools})",
    ),
    (
        r"undefined symbol|_C\b|libc10|libtorch|libcudart|DLL load failed",
        "its compiled operators are built for another torch or CUDA (here is torch {torch})",
    ),
    (r"torchvision::nms", "torchvision does not fit torch, see above"),
)


def check_detectron2(needs_operators: bool) -> Iterator[Finding]:
    """detectron2, and the pip that would install it.

    Args:
        needs_operators: whether the compiled operators are asked for.
    """
    found = install_detectron2.find_detectron2()
    install = python(_INSTALLER)
    if not found.present:
        yield Finding("detectron2", ERROR, "detectron2 is not installed.", install)
    elif not found.works:
        yield _broken(found, install)
    else:
        kind = "compiled" if _is_compiled(found) else "pure Python"
        text = f"detectron2 {found.version}, {kind}, works."
        yield Finding("detectron2", OK, text)
        if needs_operators and kind != "compiled":
            text = "the compiled operators of detectron2 are missing, which --ops asks for."
            source = "git+https://github.com/facebookresearch/detectron2.git"
            build = pip("install", "--no-build-isolation", source)
            command = f"{pip('uninstall', '-y', 'detectron2')} && {build}"
            yield Finding("operators", ERROR, text, command)
    version = version_of("pip")
    if not found.works and version and release(version) >= _PIP_REFUSES:
        text = (
            f"pip {version} refuses the archive of detectron2 0.6, of which an extra names a URL."
        )
        yield Finding("pip", ERROR, text, pip("install", "pip<26.3"))
    elif not found.works and version is None:
        yield Finding("pip", ERROR, "pip is not installed.", python("-m", "ensurepip"))


def _broken(found: install_detectron2.Detectron2, install: str) -> Finding:
    again = install if found.ours else f"{pip('uninstall', '-y', 'detectron2')} && {install}"
    error = one_line(found.error or "it cannot be found by Python")
    if match := re.fullmatch(r"ModuleNotFoundError: No module named '([\w.]+)'", error):
        module = match[1]
        if module != "pkg_resources" and not module.startswith("detectron2"):
            text = f"detectron2 needs {module}, which is not installed."
            return Finding("detectron2", ERROR, text, pip("install", _distribution(module)))
    versions = {name: version_of(name) for name in ("Pillow", "numpy", "setuptools", "torch")}
    for pattern, reason in _BREAKAGES:
        if re.search(pattern, error):
            text = f"detectron2 does not work: {reason.format(**versions)}."
            return Finding("detectron2", ERROR, text, again)
    return Finding("detectron2", ERROR, f"detectron2 does not work: {error}.", again)


def _distribution(module: str) -> str:
    """What pip calls a module that detectron2 imports."""
    name = module.partition(".")[0]
    return {"PIL": "Pillow", "hydra": "hydra-core", "cv2": "opencv-python-headless"}.get(name, name)


def _is_compiled(found: install_detectron2.Detectron2) -> bool:
    return any(path.suffix in (".so", ".pyd") for path in Path(found.location).glob("_C*"))
