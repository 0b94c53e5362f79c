"""The workflows of continuous integration: what they call exists, and versions are as declared."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it first")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = dict(
    line.split("==")
    for line in (ROOT / "requirements/pinned.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)
MARKERS = {
    marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
}
SYSTEMS = {"ubuntu-latest", "macos-latest", "windows-latest"}


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def matrix_of(job: dict[str, Any]) -> list[dict[str, str]]:
    """The variants of a job."""
    return job.get("strategy", {}).get("matrix", {}).get("include", [{}])


def commands_of(path: Path) -> Iterator[str]:
    """The commands of a workflow, each for every variant of its job."""
    for job in load(path)["jobs"].values():
        for variant, step in itertools.product(matrix_of(job), job["steps"]):
            for line in step.get("run", "").splitlines():
                for name, value in {"arguments": "", **variant}.items():
                    line = line.replace("${{ matrix." + name + " }}", str(value))
                yield line


def declared(package: str) -> str:
    """The lower bound of a dependency."""
    (found,) = (d for d in PYPROJECT["project"]["dependencies"] if re.match(rf"{package}\b", d))
    return found.partition(">=")[2]


def check(command: str) -> None:
    """Fails where a command names what is not there."""
    assert "${{" not in command, f"{command}: a value that the matrix has not"
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [w for w in words if "=" not in w and w not in targets]
        assert not unknown, f"make has no {unknown}"
        for word in words:
            if word.startswith("ARGS="):
                check_pytest(shlex.split(word.removeprefix("ARGS=")))
    elif program == "bash":
        check_shell(ROOT / words[0])
    elif words[:1] == ["-m"]:
        assert program == "python" and importlib.util.find_spec(words[1]), command
        {"pip": check_pip, "pytest": check_pytest}[words[1]](words[2:])
    else:
        assert program == "python" and (ROOT / words[0]).is_file(), command


def check_shell(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    called = [line for line in lines if line.startswith("make ")]
    assert called, f"{path} makes nothing"
    for line in called:
        check(line)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for option, value in itertools.pairwise(words):
        if option == "-r":
            assert (ROOT / value).is_file(), value
    extras = {e for w in words for e in re.findall(r"^\.\[(.+)\]$", w) for e in e.split(",")}
    assert extras <= PYPROJECT["project"]["optional-dependencies"].keys(), extras


def check_pytest(words: list[str]) -> None:
    for option, value in itertools.pairwise([*words, ""]):
        if option == "-m":
            named = set(re.findall(r"\w+", value)) - {"not", "and", "or"}
            assert named <= MARKERS, f"no marker {named - MARKERS}"
        elif option.startswith("--ignore="):
            assert (ROOT / option.partition("=")[2]).exists(), option
        elif option.startswith("tests"):
            path, _, name = option.partition("::")
            assert (ROOT / path).exists(), option
            assert not name or f"def {name}(" in (ROOT / path).read_text(), option


def test_commands_exist(subtests: pytest.Subtests) -> None:
    for path in FILES:
        with subtests.test(path=path):
            commands = list(commands_of(path))
            assert commands
            for command in commands:
                check(command)


def test_a_command_that_does_not_exist_is_found(subtests: pytest.Subtests) -> None:
    for command in [
        "make tests",
        "make test ARGS='-q tests/test_nothing.py'",
        "make test-all ARGS='tests/test_workflows.py::test_nothing'",
        "bash .ci/go",
        "python tools/install_detectron.py",
        "python -m pytesst",
        "python -m pip install -r requirements.txt",
        'python -m pip install -e ".[tests]"',
        'python -m pytest -m "not gpus"',
        "python -m pytest --ignore=tests/engines",
        "python -m pytest tests/engines",
        "python -m pip install torch==${{ matrix.torchh }}",
    ]:
        with subtests.test(command=command):
            with pytest.raises((AssertionError, OSError)):
                check(command)


def test_continuous_integration_runs_the_whole_suite() -> None:
    """All tests once, and `make test` but the slow ones of them."""
    makefile = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^([\w-]+): .*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    chosen = {name: '-m "not slow"' in recipes[name] for name in ("test", "test-all")}
    assert chosen == {"test": True, "test-all": False}
    commands = [line.split("ARGS=") for line in (ROOT / ".ci/run").read_text().splitlines()]
    arguments = [words[1] for words in commands if words[0] == "make test-all "]
    assert [
        a for a in arguments if not set(a.strip('"').split()) & {"-m", "-k"} and "tests" not in a
    ]


def test_all_systems_and_the_declared_bounds_are_run() -> None:
    variants = matrix_of(load(ROOT / ".github/workflows/tests.yml")["jobs"]["versions"])
    assert {variant["os"] for variant in variants} == SYSTEMS
    found = {tuple(variant[p] for p in ("torch", "torchvision", "numpy")) for variant in variants}
    newest = tuple(PINNED[p] for p in ("torch", "torchvision", "numpy"))
    (oldest,) = found - {newest}
    bounds = [declared(p) for p in ("torch", "torchvision", "numpy")]
    assert [version.rpartition(".")[0] for version in oldest] == bounds
    pythons = {variant["python"] for variant in variants}
    assert PYPROJECT["project"]["requires-python"] == f">={min(pythons, key=_number)}"


def test_detectron2s_main_is_run_once_a_week() -> None:
    weekly = load(ROOT / ".github/workflows/weekly.yml")
    minute, hour, day, month, weekday = weekly["on"]["schedule"][0]["cron"].split()
    assert (day, month) == ("*", "*") and weekday in "0123456"
    assert 0 <= int(minute) < 60 and 0 <= int(hour) < 24
    (checkout,) = (
        step["with"]
        for step in weekly["jobs"]["detectron2-main"]["steps"]
        if "repository" in step.get("with", {})
    )
    assert (checkout["repository"], checkout["ref"]) == ("facebookresearch/detectron2", "main")
    installed = [c for c in commands_of(FILES[-1]) if "install_detectron2.py" in c]
    assert installed == [f"python tools/install_detectron2.py --from {checkout['path']}"]


def test_jobs_are_bounded_and_may_not_write(subtests: pytest.Subtests) -> None:
    for path in FILES:
        with subtests.test(path=path):
            workflow = load(path)
            assert workflow["permissions"] == {"contents": "read"}
            for job in workflow["jobs"].values():
                assert job["timeout-minutes"] <= 120
                for step in job["steps"]:
                    assert ("run" in step) != ("uses" in step)
                    assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v0"))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
