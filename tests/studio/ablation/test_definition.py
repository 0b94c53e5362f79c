"""What a definition may say, and what is said about one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrast_d2.studio.ablation import Variant, read_definition

GOOD = """\
title: Two of them
baseline: plain
seeds: [3, 0]
overrides: [train.max_iter=5]
source: Table 9
variants:
  other: {config: b.py, overrides: [model.x=1], published: "80.0"}
  plain: {config: a.py}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "two.yaml"
    path.write_text(text)
    return path


def test_the_baseline_comes_first_and_shared_overrides_before_own(tmp_path: Path) -> None:
    ablation = read_definition(written(tmp_path, GOOD))
    assert (ablation.name, ablation.title, ablation.seeds) == ("two", "Two of them", (3, 0))
    assert (ablation.baseline, ablation.source) == ("plain", "Table 9")
    assert ablation.variants == (
        Variant("plain", "a.py", ("train.max_iter=5",), ""),
        Variant("other", "b.py", ("train.max_iter=5", "model.x=1"), "80.0"),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", r"two.yaml has an unknown key seed. Did you mean seeds\?"),
        ("model.x=1]", "model.x=1], weights: 1", "variants.other has an unknown key weights"),
        ("title: Two of them\n", "", "two.yaml has no title"),
        ("baseline: plain", "baseline: plane", "baseline=plane: must be one of other, plain"),
        ("[3, 0]", "[3, 3]", r"seeds=\[3, 3\]: needs a list of different numbers"),
        ("[3, 0]", "[true]", r"seeds=\[True\]"),
        ("[3, 0]", "[]", r"seeds=\[\]"),
        ("{config: a.py}", "{overrides: []}", "variants.plain=.*: needs a config"),
        ("  plain:", "  pl ain:", "variants.pl ain: name it with letters"),
        ("  plain:", "  other:", "'other' occurs twice"),
        ("[model.x=1]", "model.x=1", "overrides='model.x=1': needs a list"),
        ("[model.x=1]", "[train.seed=1]", "train.seed=1: seeds and folders are those of"),
        ('"80.0"', "80.0", "published=80.0: needs a text; put it in quotes"),
        ("source: Table 9\n", "", "published numbers, but no source"),
        ("  plain: {config: a.py}\n", "", "needs two or more"),
        ("title: Two", "title: [Two", "two.yaml cannot be read"),
        ("baseline: plain", "baseline: !!python/name:os.system", "two.yaml cannot be read"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        read_definition(written(tmp_path, GOOD.replace(old, new)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml cannot be read: .*No such file"):
        read_definition(tmp_path / "none.yaml")
