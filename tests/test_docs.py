"""What the pages for users say can be done: snippets run, commands parse, and tables hold.

Every fenced block is executed, or checked against the program and the config that it names, or
stands in `NOT_HERE` with the reason.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from contrast_d2.__main__ import programs
from contrast_d2.engine import argument_parser, load_config
from contrast_d2.studio.ablation import read_definition

from .documents import PAGES, ROOT, Block, Command, blocks_of, commands_in_text, commands_of

BLOCKS = [block for path in PAGES for block in blocks_of(path)]
COMMANDS = [command for block in BLOCKS for command in commands_of(block)] + [
    command for path in PAGES for command in commands_in_text(path)
]
PYTHON = [block for block in BLOCKS if block.language == "python"]

# By the page, and what the block begins with.
NOT_HERE = {
    ("docs/custom_data.md", '"""My data'): "tests/tools/test_check_dataset.py runs this page",
    ("docs/custom_data.md", "from pathlib"): "tests/tools/test_check_dataset.py runs this page",
    ("docs/methods.md", "losses, statistics = method("): "the form of a call, without a method",
    ("docs/methods.md", "ContrastSum("): "its methods are left out",
    ("docs/demo.md", "from contrast_d2.data.reading"): "needs a photograph and trained weights",
    ("docs/distributed.md", "#!/bin/bash"): "needs SLURM",
}
# Config that a fragment without imports of its own continues.
CONTINUES = {
    "docs/evaluation.md": "cityscapes.fcn_hrnet48_base_40k",
    "docs/configs.md": "camvid.semfpn_r18_base_6k",
}
# What stands for a value of the reader's.
PLACEHOLDERS = {
    "FILE": "configs/camvid/semfpn_r18_ms_cs_6k.py",
    "configs/cityscapes/FILE.py": "configs/cityscapes/fcn_hrnet48_ms_cs_40k.py",
    "configs/camvid/semfpn_r18_ms_cs_half.py": "configs/camvid/semfpn_r18_ms_cs_6k.py",
    "configs/my_data/semfpn_r18_ms_cs.py": "configs/camvid/semfpn_r18_ms_cs_6k.py",
    "configs/my_data/semfpn_r18_ms_cs_6k.py": "configs/camvid/semfpn_r18_ms_cs_6k.py",
    "OVERRIDES": "train.max_iter=3",
    "train.seed=SEED": "train.seed=1",
    "N": "1",
    "S": "1",
}
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


class Parsed(Exception):
    """The arguments are those that the program takes."""


def reason_not_here(block: Block) -> str | None:
    for (page, start), reason in NOT_HERE.items():
        if block.page == page and block.text.startswith(start):
            return reason
    return None


def is_listing(block: Block) -> bool:
    """Folders and files, one per line, with remarks."""
    lines = [line for line in block.text.splitlines() if line.strip()]
    paths = [re.match(r"\s*\S*[/.]\S*(\s|$)", line) for line in lines]
    return block.language == "" and all(
        path or line.startswith("python ") for path, line in zip(paths, lines, strict=True)
    )


def test_every_block_is_run_or_checked_or_listed() -> None:
    unknown = []
    for block in BLOCKS:
        checked = (
            block.language in ("python", "json", "yaml")
            or block.language.startswith("{")  # of Sphinx, which `make docs` builds
            or is_listing(block)
        )
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
        if not (checked or reason_not_here(block)) and len(lines) != len(list(commands_of(block))):
            unknown.append(f"{block}: not all of its {len(lines)} lines are commands")
    assert not unknown, "\n".join(unknown)


def test_a_block_that_nothing_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for language, text in (("", "python train_net.py\nls output\n"), ("c", "int x;\n")):
        block = Block("README.md", 0, language, text)
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="README.md"):
            patch.setattr(sys.modules[__name__], "BLOCKS", [*BLOCKS, block])
            test_every_block_is_run_or_checked_or_listed()


def test_what_is_listed_is_there() -> None:
    for page, start in NOT_HERE:
        found = [b for b in BLOCKS if b.page == page and b.text.startswith(start)]
        assert found, f"{page} has no block that begins with {start!r} any more"


def test_the_pages_are_seen() -> None:
    assert len(BLOCKS) > 60 and len(COMMANDS) > 60 and len(PYTHON) > 8


def load_fragment(block: Block, folder: Path) -> DictConfig:
    """The config of an experiment file, or of a piece of one, that a page shows."""
    configs = folder / "configs"
    configs.mkdir()
    for path in (ROOT / "configs").iterdir():
        (configs / path.name).symlink_to(path)
    names = "dataloader, dataset, lr_multiplier, model, optimizer, train"
    start = "" if "from .." in block.text else f"from ..{CONTINUES[block.page]} import {names}\n"
    (configs / "page").mkdir()
    (configs / "page/experiment.py").write_text(start + block.text)
    return load_config(str(configs / "page/experiment.py"))


@pytest.mark.parametrize("block", [b for b in PYTHON if not reason_not_here(b)], ids=str)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if re.search(r"^(model|dataloader)\.", block.text, re.MULTILINE):
        cfg = load_fragment(block, tmp_path)
        changed = re.findall(r"^((?:model|dataloader|train)[\w.]+) = (\S+)", block.text, re.M)
        assert changed
        for key, value in changed:
            found = eval(f"cfg.{key}", {"cfg": cfg})
            if value.startswith(("L(", "_", "[")):
                assert found is not None, key
            else:
                assert found == ast.literal_eval(value), key
        return
    if "segmentation_models_pytorch" in block.text:
        pytest.importorskip("segmentation_models_pytorch", reason="the extra `losses`")
    loop = "\nfor images"
    text = block.text.replace(loop, f"\nbefore = [p.clone() for p in model.parameters()]\n{loop}")
    names: dict[str, Any] = {}
    exec(compile(text, str(block), "exec"), names)
    losses = names["losses"]
    assert losses and all(name.startswith("loss_contrast_") for name in losses)
    assert sum(losses.values()) > 0
    gradients = [p.grad for p in names["contrast"].parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    if "before" in names:  # a training loop, whose network is the one that is kept
        pairs = zip(names["model"].parameters(), names["before"], strict=True)
        assert all((after != before).any() for after, before in pairs)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml(block: Block, tmp_path: Path) -> None:
    """The definition of an ablation, whose variants have the keys that it overrides."""
    (tmp_path / "page.yaml").write_text(block.text)
    ablation = read_definition(tmp_path / "page.yaml")
    assert ablation.baseline in block.text and len(ablation.variants) > 1
    for variant in ablation.variants:
        cfg = load_config(str(ROOT / variant.config), variant.overrides)
        for key, value in (override.split("=", 1) for override in variant.overrides):
            assert OmegaConf.select(cfg, key) == ast.literal_eval(value)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json(block: Block) -> None:
    assert json.loads(block.text)["classes"]


def check_training(words: list[str]) -> None:
    """The flags are those of train_net.py, the file exists, and it has the keys."""
    args = argument_parser().parse_args(words)
    load_config(str(ROOT / args.config_file), args.opts)


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parse_args(self: Any, *args: Any, parse: Any = parse, **options: Any) -> NoReturn:
            parse(self, *args, **options)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse_args)


def check_tool(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program parses the words; the experiment files among them exist."""
    for word in words:
        if re.fullmatch(r"configs/\S+\.(py|yaml)", word):
            assert (ROOT / word).is_file(), word
    path = programs()[name]
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    main = runpy.run_path(str(path))["main"]  # not as __main__, where some start themselves anew
    stop_after_parsing(monkeypatch)
    with pytest.raises(Parsed):
        main()


def check_pip(words: list[str]) -> None:
    """What is installed is pip itself or this project, with extras that it has."""
    assert words[0] in ("install", "wheel")
    requirements = [word for word in words[1:] if not word.startswith("-") and word != "dist"]
    assert requirements
    for word in requirements:
        name, _, extras = word.removesuffix("]").partition("[")
        known = name in (".", "contrast_d2", "dist/contrast_d2-*.whl")
        assert known or re.match(r"pip[<=>]", name), word
        assert not extras or set(extras.split(",")) <= set(EXTRAS), word


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    assert targets and not set(targets) - set(TARGETS), targets


def plain(words: list[str]) -> list[str]:
    """Without brackets around what may be left out, and with values for placeholders."""
    kept = [word.removeprefix("[") for word in words if word not in ("...", "...]")]
    kept = [word if "[" in word else word.removesuffix("]") for word in kept]
    return [PLACEHOLDERS.get(word, word) for word in kept]


def check_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = plain(command.words)
    if len(words) == 1 and program in ("python", "contrast-d2"):  # the text speaks of a program
        assert Path(words[0]).stem in programs(), command
    elif program == "python" and words[0] == "-m":
        assert words[1] in ("pytest", "contrast_d2"), command
    elif program == "pip":
        check_pip(words)
    elif program == "make":
        check_make(words)
    elif "train_net.py" in words or words[0] == "train_net":
        start = words.index("train_net.py" if "train_net.py" in words else "train_net")
        assert start == 0 or program == "torchrun"
        check_training(words[start + 1 :])
    else:
        name = words[0].removeprefix("tools/").removesuffix(".py")
        assert name in programs(), command
        values = {"NAME": "camvid" if name == "prepare_dataset" else "NAME"}
        check_tool(name, [values.get(word, word) for word in words[1:]], monkeypatch)


def test_commands(monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    for command in {tuple(c.words): c for c in COMMANDS}.values():
        with subtests.test(str(command)), monkeypatch.context() as patch:
            check_command(command, patch)


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown config key train.max_iters"):
        check_training(["--config-file", PLACEHOLDERS["FILE"], "train.max_iters=3"])
    with pytest.raises(SystemExit):
        check_tool("prepare_dataset", ["camvid", "--nothing"], monkeypatch)
    with pytest.raises(AssertionError):
        check_make(["demos"])
    for requirement in (".[nothing]", "contrast_d2[test,nothing]", "contrast"):
        with pytest.raises(AssertionError):
            check_pip(["install", requirement])


SOURCES = "\n".join(
    path.read_text()
    for folder in ("contrast_d2", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
)
# Messages of Python, torch and Pillow.
FOREIGN = (
    "No module named",
    "module 'PIL.Image' has no attribute 'LINEAR'",
    "operator torchvision::nms does not exist",
)


def test_messages_that_the_page_on_troubleshooting_quotes_are_ours() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [r.split("|")[1] for r in text.splitlines() if r.startswith("| ") and "---" not in r]
    quoted = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    messages = [code for code in quoted if " " in code and not code.startswith(FOREIGN)]
    assert len(messages) >= 10
    # A message is written over several lines of a source, as adjacent strings.
    joined = re.sub(r"\"\s*\n\s*f?\"", "", SOURCES)
    assert not [message for message in messages if message not in joined]


def test_the_reference_has_all_packages() -> None:
    named = set(re.findall(r"automodule:: (\S+)", (ROOT / "docs/api.md").read_text()))
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "contrast_d2").rglob("__init__.py")
    }
    modules = {f"contrast_d2.{path.stem}" for path in (ROOT / "contrast_d2").glob("[!_]*.py")}
    missing = (packages | modules) - named - {"contrast_d2", "contrast_d2.structures"}
    assert missing <= {"contrast_d2.weights"}, missing
