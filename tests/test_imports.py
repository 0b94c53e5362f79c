"""Which part of the package may know which, and what no part may do, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from contrast_d2.decoders import __all__ as DECODERS

ROOT = Path(__file__).parents[1]
PACKAGE = "contrast_d2"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What a part may import of the package besides itself. The arrows: config -> segmentor ->
# {backbones, decoders, contrast, losses}.
ALLOWED = {
    "": {"backbones", "config", "data", "decoders", "segmentor"},
    "__main__": {"resources"},
    "backbones": {"registries", "weights"},
    "config": {"backbones", "evaluation", "registries", "resources"},
    "contrast": set(),
    "decoders": {"registries", "structures"},
    "losses": {"structures"},
    "structures": set(),
    "registries": {"resources"},
    "resources": set(),
    "weights": set(),
    "figures": set(),
    "files": set(),
    "data": {"files"},
    "evaluation": {"data", "figures", "files"},
    "segmentor": {"backbones", "contrast", "decoders", "losses", "registries", "structures"},
    "engine": {
        "__version__",
        *("backbones", "config", "data", "evaluation", "files", "registries"),
        *("segmentor", "weights"),
    },
    "deploy": {"data", "engine", "evaluation", "losses", "segmentor", "structures"},
    "studio": {
        "contrast",
        "data",
        "evaluation",
        "figures",
        "files",
        "losses",
        "segmentor",
        "structures",
    },
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import x` may name a module x.
            yield from (f"{start}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """ "contrast" for contrast_d2.contrast.sampling; "" outside the package and for the package."""
    names = name.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else ""


def calls(file: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_parser_sees_all_kinds_of_import(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / PACKAGE / "data" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import contrast_d2.engine\nfrom .. import losses\nfrom ..contrast.memory import Bank\n"
        "from . import labels\ndef f():\n    from contrast_d2.backbones import timm\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [part_of(name) for name in imports(file)] == [
        "engine",
        "losses",
        "contrast",
        "data",
        "backbones",
    ]


def test_direction_of_imports() -> None:
    for file in FILES:
        own = part_of(module_name(file))
        found = {part_of(name) for name in imports(file)} - {"", own}
        assert found <= ALLOWED[own], label(file)


def closure(*files: Path) -> set[str]:
    """The modules that files import, and what these import in turn, in functions too."""
    modules = {module_name(file): file for file in FILES}
    needed: set[str] = set()
    waiting = list(files)
    while waiting:
        for name in imports(waiting.pop()):
            parts = name.split(".")
            # Importing a module imports the packages that it is in.
            above = {".".join(parts[: i + 1]) for i in range(len(parts))}
            found = (above & modules.keys()) - needed
            needed |= found
            waiting += [modules[module] for module in found]
    return needed


def test_a_training_needs_nothing_of_the_studio() -> None:
    needed = closure(ROOT / "train_net.py")
    assert {f"{PACKAGE}.engine.trainer", f"{PACKAGE}.data.mapper"} <= needed
    assert not {part_of(name) for name in needed} & {"deploy", "studio"}


def test_a_contrast_method_reads_in_few_files() -> None:
    folder = ROOT / PACKAGE / "contrast"
    read, waiting = set(), [folder / "multiscale.py"]
    while waiting:
        file = waiting.pop()
        if file not in read:
            read.add(file)
            names = {name.split(".")[2] for name in imports(file) if name.count(".") > 1}
            waiting += [f for name in names if (f := folder / f"{name}.py").exists()]
    assert folder / "terms.py" in read and len(read) <= 9, sorted(read)
    names = ["multiscale", "pixel", "contextual", "contextual_plus", "pne", "region"]
    for name in [*names, "prototypes", "clusters", "centres", "tree"]:
        source = (folder / f"{name}.py").read_text()
        assert len(source.splitlines()) <= 300, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert len(arguments) <= 11, (name, "more than ten parameters, besides self")


def test_contrast_needs_torch_only() -> None:
    for file in FILES:
        if part_of(module_name(file)) == "contrast":
            roots = {name.split(".")[0] for name in imports(file)}
            # Triton comes with PyTorch where it is of use.
            needed = roots - set(sys.stdlib_module_names)
            assert needed <= {"torch", "triton", "numpy", PACKAGE}, label(file)


def run(program: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_contrast_is_usable_without_detectron2() -> None:
    without = "import sys\nsys.modules['detectron2'] = None\n"
    program = "import contrast_d2.contrast\nprint({name.split('.')[0] for name in sys.modules})"
    loaded = ast.literal_eval(run(without + program))
    assert PACKAGE in loaded
    assert not loaded & {"fvcore", "timm", "omegaconf", "hydra", "matplotlib"}


def test_the_package_fills_detectron2s_registries() -> None:
    program = """
import contrast_d2
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
registries = (BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY)
print([sorted(name for name, _ in registry) for registry in registries])
print("shapes_sem_seg_train" in DatasetCatalog, callable(contrast_d2.add_contrast_config))
"""
    names, others = run(program).splitlines()
    backbones, architectures, heads = ast.literal_eval(names)
    assert "TimmBackbone" in backbones and "ContrastiveSegmentor" in architectures
    assert set(DECODERS) - {"Decoder"} <= set(heads)  # the class that they extend aside
    assert others == "True True"


def test_nothing_moves_itself_to_a_gpu() -> None:
    for file in FILES:
        for call in calls(file):
            moves = isinstance(call.func, ast.Attribute) and call.func.attr == "cuda"
            assert not moves, f"{label(file)}:{call.lineno}: move with .to(device)"


def test_modules_take_no_device() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{label(file)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert "device" not in [a.arg for a in arguments], where
