"""What the README says can be done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from contrast_d2.engine import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CAMVID = "configs/camvid/semfpn_r18_ms_cs_6k.py"


def test_the_training_loop_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert set(names["losses"]) == {
        "loss_contrast_res2",
        "loss_contrast_res5",
        "loss_contrast_res2_res5",
    }
    assert all(torch.isfinite(p.grad).all() for p in names["contrast"].parameters())


def test_files_that_it_names_exist() -> None:
    paths = re.findall(r"\b(?:configs|tools|docs|results|contrast_d2)/[\w./]*\w\.\w+", README)
    assert CAMVID in paths and len(set(paths)) >= 5
    missing = [path for path in set(paths) if not (ROOT / path).is_file()]
    assert not missing


def test_overrides_that_it_names_are_known(subtests: pytest.Subtests) -> None:
    for page in ["README.md", "docs/configs.md", "docs/troubleshooting.md"]:
        with subtests.test(page=page):
            text = (ROOT / page).read_text()
            overrides = re.findall(
                r"\b((?:train|model|optimizer|dataloader)\.[\w.]+=[\w.,\[\]]+)", text
            )
            assert len(overrides) >= 6
            for override in set(overrides):
                # Methods without a memory do not have its keys.
                memory = override.startswith("model.contrast.memory.")
                config = CAMVID.replace("ms_cs", "pixel_memory") if memory else CAMVID
                load_config(str(ROOT / config), [override])


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_has_the_two_commands(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
