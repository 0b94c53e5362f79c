"""Install detectron2 as pure Python: everything semantic segmentation needs, and no compiler.

Does nothing when a working detectron2 is importable. Otherwise takes the source archive of
detectron2 0.6 (or, with ``--from``, a checkout or archive that you have), applies the few changes
that current torch, numpy and Pillow ask for, builds a wheel named ``detectron2`` and installs it;
``pip uninstall detectron2`` removes it. The last step is the only one that touches the environment.

    python tools/install_detectron2.py                        # install if there is none
    python tools/install_detectron2.py --from ~/detectron2    # from a checkout or source archive
    python tools/install_detectron2.py --wheel wheels/        # only write the wheel
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# The official sources are not on the package index under their own name. This source archive holds
# the Python files of the tag v0.6 and lacks the C++ files, so that pip alone cannot build it.
ARCHIVE_NAME = "pb1-detectron2"
ARCHIVE_VERSION = "0.6"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# The local version by which this script knows its own installations again, and how old they are.
BUILD = "purepython"
LOCAL_VERSION = f"{BUILD}.2"

# detectron2's setup.py installs these projects as part of the package; so does this script.
PROJECTS = {
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

REQUIRES = (
    "torch>=1.8",
    "torchvision",
    "numpy",
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)

STUB_PATH = "detectron2/_C.py"
STUB = '''"""Stands in for detectron2's compiled operators, which a pure-Python build lacks."""


# detectron2.utils.collect_env asks these three of every build.
def get_compiler_version():
    return "none: pure-Python build"


def get_cuda_version():
    return "none: pure-Python build"


def has_cuda():
    return False


def __getattr__(name):
    # Introspection asks modules for optional dunder names and expects an AttributeError.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"detectron2._C.{name} is a compiled operator, and this detectron2 is a pure-Python build "
        "without them. To use it, uninstall detectron2 and build the original from its sources."
    )
'''


class Fix(NamedTuple):
    """A change that every Python file of detectron2 is searched for."""

    name: str
    pattern: re.Pattern[str]
    replacement: str


FIXES = (
    # Pillow 10 removed the alias, which detectron2.data.transforms reads at import.
    Fix("Image.LINEAR", re.compile(r"(?<![\w.])Image\.LINEAR\b"), "Image.BILINEAR"),
    # numpy 1.24 removed these aliases of the builtins. The \b leaves np.int32 and np.bool_ alone.
    Fix(
        "numpy aliases",
        re.compile(r"(?<![\w.])(?:np|numpy)\.(bool|int|float|str|object)\b"),
        r"\1",
    ),
    # Processes on a CPU, over gloo, as detectron2's main branch starts them.
    Fix(
        "launch without CUDA",
        re.compile(r"    assert torch\.cuda\.is_available\(\), \"cuda is not available\..*\n"),
        "",
    ),
    Fix(
        "launch over gloo",
        re.compile(r'backend="NCCL"'),
        'backend="NCCL" if torch.cuda.is_available() else "GLOO"',
    ),
    Fix(
        "launch without devices",
        re.compile(
            r"    assert num_gpus_per_machine <= torch\.cuda\.device_count\(\)\n"
            r"    torch\.cuda\.set_device\(local_rank\)\n"
        ),
        "    if torch.cuda.is_available():\n        torch.cuda.set_device(local_rank)\n",
    ),
    # numpy 2 turned copy=False from "avoid a copy" into "fail if one is needed".
    Fix(
        "np.array(copy=False)",
        re.compile(r"(?<![\w.])np\.array\((\w+), copy=False\)"),
        r"np.asarray(\1)",
    ),
)

# Runs in a process of its own: sys.argv[1] says whether to import what the project uses, the
# optional sys.argv[2] is put first on the path. The last line of its output is the answer.
PROBE = """
import importlib.metadata, importlib.util, json, sys
sys.path[0:0] = sys.argv[2:3]
found = {"version": None, "location": None, "distribution": None, "error": None}
try:
    distribution = importlib.metadata.distribution("detectron2")
    found["distribution"] = distribution.version
except importlib.metadata.PackageNotFoundError:
    distribution = None
spec = importlib.util.find_spec("detectron2")
if spec is not None and spec.origin is not None:
    from pathlib import Path
    init = Path(spec.origin).resolve()
    found["location"] = str(init.parent)
    if distribution is not None:
        if Path(distribution.locate_file("detectron2/__init__.py")).resolve() != init:
            found["distribution"] = None
    if sys.argv[1] == "import":
        try:
            import detectron2
            import detectron2.checkpoint
            import detectron2.config
            import detectron2.data.transforms
            import detectron2.engine
            import detectron2.solver
            import detectron2.utils.events
            from detectron2.config import LazyConfig
            from detectron2.evaluation import SemSegEvaluator
            from detectron2.modeling import SemanticSegmentor
            from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
            from detectron2.structures.masks import polygons_to_bitmask
            # An unchanged 0.6 imports with an old Pillow, then fails on numpy's lost aliases.
            polygons_to_bitmask([], 2, 2)
            found["version"] = detectron2.__version__
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class InstallError(Exception):
    """What the user has to know, in one line."""


class Detectron2(NamedTuple):
    """The detectron2 that an interpreter finds.

    ``location`` is None when there is nothing to import, ``distribution`` is the version that pip
    knows it by (None: pip did not install it), ``error`` says why it does not work.
    """

    version: str | None
    location: str | None
    distribution: str | None
    error: str | None

    @property
    def present(self) -> bool:
        return self.location is not None or self.distribution is not None

    @property
    def works(self) -> bool:
        return self.location is not None and self.error is None

    @property
    def ours(self) -> bool:
        return self.distribution is not None and BUILD in self.distribution

    @property
    def outdated(self) -> bool:
        return self.ours and not str(self.distribution).endswith(LOCAL_VERSION)


class Source(NamedTuple):
    """The Python files of one detectron2: wheel path -> bytes, its licence and its version."""

    files: dict[str, bytes]
    license: bytes
    version: str


def find_detectron2(path: Path | None = None, do_import: bool = True) -> Detectron2:
    """Look at the detectron2 of this interpreter.

    Args:
        path: a directory to look in before all others.
        do_import: also import what the project uses; takes a few seconds when there is one.
    """
    command = [sys.executable, "-c", PROBE, "import" if do_import else "find"]
    if path is not None:
        command.append(str(path))
    # python -c looks in the current folder first, which may be a checkout of detectron2.
    with tempfile.TemporaryDirectory() as cwd:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode == 0:
        return Detectron2(**json.loads(done.stdout.splitlines()[-1]))
    if do_import:  # importing took the interpreter down; where it lies is still of use
        error = _last_line(done.stderr) or f"the import ends with status {done.returncode}"
        return find_detectron2(path, do_import=False)._replace(error=error)
    raise InstallError(f"{sys.executable} does not start: {_last_line(done.stderr)}")


def require(*modules: str) -> None:
    """Check that modules can be found, without importing them.

    Raises:
        InstallError: names the first that is missing and what to do.
    """
    advice = {
        "torch": "install a matching torch and torchvision, such as those of "
        "requirements/pinned.txt",
        "torchvision": "install the torchvision that matches your torch",
        "pip": f"run {sys.executable} -m ensurepip",
        "setuptools": f"run {sys.executable} -m pip install setuptools",
    }
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InstallError(
                f"{module} is not installed for {sys.executable}; {advice[module]} first"
            )


def download(directory: Path) -> Path:
    """Fetch the source archive of detectron2 0.6 with pip, hence with the user's index and proxy.

    Args:
        directory: where the archive is put.

    Returns:
        The archive, its sha256 checked.

    Raises:
        InstallError: pip cannot get it, or the checksum is wrong.
    """
    # pip checks the hash, then runs the archive's setup.py, which imports torch, for its metadata.
    require("pip", "setuptools", "torch")
    requirement = f"{ARCHIVE_NAME}=={ARCHIVE_VERSION}"
    pins = directory / "requirements.txt"
    pins.write_text(f"{requirement} --hash=sha256:{ARCHIVE_SHA256}\n")
    done = _pip(
        "download",
        "--no-deps",
        f"--no-binary={ARCHIVE_NAME}",
        "--no-build-isolation",
        "--require-hashes",
        f"--requirement={pins}",
        f"--dest={directory}",
    )
    if done.returncode:
        raise InstallError(_explain_download(requirement, done.stdout + done.stderr))
    (archive,) = directory.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise InstallError(_wrong_checksum(requirement, digest))
    return archive


def _explain_download(requirement: str, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return _wrong_checksum(requirement, got[1] if got else "another")
    if "No matching distribution" in output:
        return (
            f"pip found no {requirement}: there is no network, or your package index lacks it; "
            "with a checkout or source archive of detectron2 at hand, use --from"
        )
    if "direct URL dependencies" in output:
        # pip 26.3 refuses archives of which an extra names a URL, as 0.6 does, whatever is asked of
        # them. That is the user's pip and its policy: it is not worked around here.
        return (
            f"this pip refuses {requirement}, because one of its extras names a URL: run "
            f"{sys.executable} -m pip install 'pip<26.3' first, or give a checkout or source "
            "archive of detectron2 with --from"
        )
    torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    if torch.returncode:
        return f"torch of {sys.executable} cannot be imported: {_last_line(torch.stderr)}"
    return f"pip could not download {requirement}: {_pip_error(output)}"


def _wrong_checksum(requirement: str, digest: str) -> str:
    return (
        f"{requirement} has a wrong checksum and was not used: expected sha256 {ARCHIVE_SHA256}, "
        f"got {digest}"
    )


def read_source(path: Path) -> Source:
    """Read the Python files of a checkout or source archive of detectron2 into memory.

    Args:
        path: a folder, a tar archive or a zip archive that holds ``detectron2/`` and ``projects/``
            at its top or in its only folder.

    Raises:
        InstallError: ``path`` cannot be read, holds no detectron2 sources, or has a member that
            points out of the archive.
    """
    if not path.exists():
        raise InstallError(f"{path} does not exist")
    try:
        if path.is_dir():
            members = dict(_directory_members(path))
        elif tarfile.is_tarfile(path):
            members = dict(_tar_members(path))
        elif zipfile.is_zipfile(path):
            members = dict(_zip_members(path))
        else:
            raise InstallError(f"{path} is neither a folder nor a tar or zip archive")
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise InstallError(f"{path} cannot be read: {error}") from error

    roots = [n[: -len("detectron2/__init__.py")] for n in members if _is_package_init(n)]
    if not roots:
        raise InstallError(f"{path} holds no detectron2/__init__.py: it is no detectron2 source")
    root = min(roots, key=len)
    files = {}
    for name, data in members.items():
        target = _wheel_path(name[len(root) :]) if name.startswith(root) else None
        if target is not None:
            files[target] = data
    for source, target in PROJECTS.items():
        if target + "__init__.py" not in files:
            raise InstallError(f"{path} holds no {source}: give a full checkout or source archive")
    init = files["detectron2/__init__.py"].decode()
    version = re.search(r"""^__version__ = ["']([\w.+]+)["']""", init, re.MULTILINE)
    if version is None:
        raise InstallError(f"{path}: detectron2/__init__.py states no __version__")
    return Source(files, members.get(root + "LICENSE", b""), version[1])


def _is_package_init(name: str) -> bool:
    return name.endswith("detectron2/__init__.py") and len(PurePosixPath(name).parts) <= 3


def _wheel_path(name: str) -> str | None:
    if not name.endswith(".py"):
        return None
    for source, target in PROJECTS.items():
        if name.startswith(source):
            return target + name[len(source) :]
    # The model zoo's configs are useless without pkg_resources, which its code imports.
    if name.startswith("detectron2/") and not name.startswith("detectron2/model_zoo/configs/"):
        return name
    return None


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise InstallError(f"the archive has the unsafe member {name!r} and was not used")
    return path.suffix == ".py" or path.name == "LICENSE"


def _directory_members(root: Path) -> Iterator[tuple[str, bytes]]:
    for top in (root / "LICENSE", root / "detectron2", root / "projects"):
        for path in [top] if top.is_file() else sorted(top.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and _is_wanted(name):
                yield name, path.read_bytes()


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            wanted = _is_wanted(member.name)
            if wanted and member.isfile():
                yield PurePosixPath(member.name).as_posix(), archive.extractfile(member).read()


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if _is_wanted(member.filename) and not member.is_dir():
                yield PurePosixPath(member.filename).as_posix(), archive.read(member)


def apply_fixes(source: Source, strict: bool) -> Source:
    """Make a source work with current torch, numpy and Pillow, and without compiled operators.

    Args:
        source: the original files.
        strict: every fix has to change something, as it does in 0.6; a newer detectron2 may have
            some of them already.

    Returns:
        The changed source. Each changed file says so in its last line.

    Raises:
        InstallError: ``strict`` and a fix found nothing to change, or a file is no UTF-8.
    """
    files = {}
    used = set()
    for name, data in source.files.items():
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InstallError(f"{name} of the source is no UTF-8 text: {error}") from error
        changes = []
        for fix in FIXES:
            text, count = fix.pattern.subn(fix.replacement, text)
            if count:
                changes.append(fix.name)
        if changes:
            note = f"# Changed by install_detectron2.py of contrast_d2: {', '.join(changes)}.\n"
            data = (text + ("" if text.endswith("\n") else "\n") + note).encode()
            used.update(changes)
        files[name] = data
    if any(b"import _C" in data for data in files.values()):
        used.add("detectron2._C")
    wanted = [fix.name for fix in FIXES] + ["detectron2._C"]
    for number, name in enumerate(wanted, start=1):
        if strict and name not in used:
            raise InstallError(
                f"fix {number} ({name}) found nothing to change: this is not the detectron2 "
                f"{ARCHIVE_VERSION} that this script knows"
            )
    files[STUB_PATH] = STUB.encode()
    return source._replace(files=files)


def build_wheel(source: Source, directory: Path) -> Path:
    """Write a source as a wheel.

    Args:
        source: files that need no compilation.
        directory: where the wheel is written; made if it does not exist.

    Returns:
        The wheel.

    Raises:
        InstallError: the directory cannot be written to.
    """
    version = local_version(source.version)
    info = f"detectron2-{version}.dist-info"
    files = dict(sorted(source.files.items()))
    files[f"{info}/LICENSE"] = source.license
    files[f"{info}/METADATA"] = _metadata(version).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(data)])
    rows.writerow([f"{info}/RECORD", "", ""])
    files[f"{info}/RECORD"] = record.getvalue().encode()

    wheel = directory / f"detectron2-{version}-py3-none-any.whl"
    partial = wheel.with_suffix(".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                # A fixed date: the same source gives the same wheel.
                member = zipfile.ZipInfo(name, date_time=(2021, 11, 15, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                member.external_attr = 0o644 << 16
                archive.writestr(member, data)
        os.replace(partial, wheel)
    except OSError as error:
        raise InstallError(f"cannot write the wheel to {directory}: {error}") from error
    return wheel


def local_version(version: str) -> str:
    """Mark a version as that of the pure-Python build: ``0.6`` becomes ``0.6+purepython.2``."""
    return version + ("." if "+" in version else "+") + LOCAL_VERSION


def _metadata(version: str) -> str:
    lines = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {version}",
        "Summary: detectron2 as pure Python, without compiled operators, with compatibility fixes",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
        "",
        "The Python files of detectron2, changed as follows to work with current versions of its",
        "dependencies and without a compiler; each changed file says so in its last line:",
        "",
        *(f"- {fix.name}" for fix in FIXES),
        "- detectron2._C, the compiled operators, is a module that raises ImportError on use",
        "",
    ]
    return "\n".join(lines)


def install(source: Source, directory: Path) -> Detectron2:
    """Try a source out, then install it as the distribution ``detectron2``.

    Args:
        source: the fixed source.
        directory: an empty folder for the files in between.

    Returns:
        The installed detectron2.

    Raises:
        InstallError: the source would not work here (nothing was changed), or pip fails.
    """
    require("pip", "torch", "torchvision")
    trial = directory / "trial"
    for name, data in source.files.items():
        path = trial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tried = find_detectron2(trial)
    if not tried.works:
        raise InstallError(
            f"detectron2 {source.version} does not work with the packages of {sys.executable}, "
            f"and was not installed: {_one_line(tried.error)}"
        )
    wheels = directory / "wheels"
    build_wheel(source, wheels)
    done = _pip(
        "install",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        # By name, not by path: pip freeze would go on to name the temporary file.
        f"--find-links={wheels}",
        f"detectron2=={local_version(source.version)}",
    )
    if done.returncode:
        raise InstallError(f"pip could not install the wheel: {_pip_error(done.stderr)}")
    return find_detectron2(do_import=False)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def _pip_error(output: str) -> str:
    errors = [line for line in output.splitlines() if line.lower().startswith("error:")]
    return _one_line(errors[-1][len("error:") :]) if errors else _last_line(output)


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return _one_line(lines[-1]) if lines else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "it cannot be imported").split())[:400]


def run(source: Path | None, wheel_dir: Path | None) -> str:
    """Do what the command line asks for.

    Args:
        source: a checkout or archive to use instead of the download.
        wheel_dir: only write the wheel there.

    Returns:
        A line for the user.

    Raises:
        InstallError: it cannot be done; the environment is as it was.
    """
    if wheel_dir is None:
        found = find_detectron2()
        if found.works and source is None and not found.outdated:
            return f"detectron2 {found.version} at {found.location} works: nothing to do"
        if found.present and not found.ours:
            state = "works" if found.works else f"does not work ({_one_line(found.error)})"
            raise InstallError(
                f"the detectron2 at {found.location or 'an unknown place'} {state} and was not "
                f"installed by this script; to replace it, remove it first ({sys.executable} -m "
                "pip uninstall detectron2)"
            )
    with tempfile.TemporaryDirectory(prefix="detectron2-") as temporary:
        directory = Path(temporary)
        original = read_source(download(directory) if source is None else source)
        fixed = apply_fixes(original, strict=source is None)
        if wheel_dir is not None:
            return str(build_wheel(fixed, wheel_dir))
        installed = install(fixed, directory)
    return f"installed detectron2 {installed.distribution} at {installed.location}"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run it, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Install detectron2 as pure Python, unless a working one is there already."
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR|ARCHIVE",
        help="take detectron2 from this checkout or source archive and download nothing",
    )
    parser.add_argument(
        "--wheel",
        dest="wheel_dir",
        type=Path,
        metavar="DIR",
        help="only write the wheel to DIR and print its path",
    )
    arguments = parser.parse_args(argv)
    try:
        print(run(arguments.source, arguments.wheel_dir))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
