"""The ledger: numbers at the files that they are bound to, and nowhere else."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml

from contrast_d2.studio.ledger import MARK, Ledger, generated

ROOT = Path(__file__).parents[2]
LEDGER = Ledger(ROOT / "configs/ledger.yaml")
SMALL = """\
papers:
  new:
    cite: Us et al., 2022
    title: Something new.
    tables:
      Table 1:
        columns: [mIoU, ±, GB]
        own:
          cityscapes/net_base_1k: [70.0, 0.1, 3.5]
        cited:
          Them et al., 2020: {cityscapes/net_own_1k: [69.5, 0.25, null]}
      Table 2:
        columns: [mIoU]
        own: {cityscapes/net_base_1k: [71.5]}
        lost: [cityscapes/net_other_1k]
      Table 3(a):
        columns: [mIoU]
        own: {cityscapes/net_base_1k: [71.5]}
settings:
  data: {paper: new, gpus: [2, ours, nothing is stated], lr: [0.1, paper 2]}
  fast: {lr: [0.5, release a.py:3], where: a map, preset: Preset `fast`., says: It is fast.}
  slow: {lr: [0.3, ours, for a reason], preset: Preset `slow`.}
experiments:
  cityscapes/net_base_1k: data
  cityscapes/net_own_1k: data fast
  cityscapes/net_other_1k: data fast slow
  cityscapes/net_again_1k: data
readings: {cityscapes/net_again_1k: cityscapes/net_base_1k}
notes: {cityscapes/net_own_1k: "One more."}
words:
  datasets: {cityscapes: Cityscapes}
  models: {net: A net}
  methods: {base: baseline, own: ours, other: another, again: once more}
"""


@pytest.fixture
def small(tmp_path: Path) -> Ledger:
    (tmp_path / "ledger.yaml").write_text(SMALL)
    return Ledger(tmp_path / "ledger.yaml")


def test_later_settings_win(small: Ledger) -> None:
    rates = {file: small.settings(file)["lr"] for file in small.experiments}
    assert [rate.value for rate in rates.values()] == [0.1, 0.5, 0.3, 0.1]
    assert rates["cityscapes/net_other_1k"] == (0.3, "ours", "for a reason")


def test_numbers_say_whose_they_are(small: Ledger) -> None:
    expected = (
        "70.0 ± 0.10 mIoU, 3.5 GB (Table 1 of Us et al., 2022); 71.5 mIoU (Tables 2 and 3(a))"
    )
    assert small.published("cityscapes/net_base_1k") == expected
    assert small.published("cityscapes/net_again_1k") == expected
    assert small.published("cityscapes/net_own_1k", home="new") == (
        "69.5 ± 0.25 mIoU (Them et al., 2020, as cited in Table 1)"
    )
    assert small.published("cityscapes/net_other_1k") == (
        "a number that our copy of Table 2 of Us et al., 2022 does not show"
    )


def test_heads(small: Ledger) -> None:
    assert small.head("cityscapes/net_own_1k") == (
        "Cityscapes, A net, ours on a map: 69.5 ± 0.25 mIoU (Them et al., 2020, as cited in "
        "Table 1 of Us\net al., 2022). Two GPUs; nothing is stated.\n\n"
        "python train_net.py --config-file configs/cityscapes/net_own_1k.py --num-gpus 2\n\n"
        "Preset `fast`. It is fast. One more.\n"
    )
    assert "Preset `slow`. It is fast." in small.head("cityscapes/net_other_1k")
    assert small.with_head("cityscapes/net_base_1k", '"""Old,\n\nlong."""\n\nx = 1\n') == (
        f'"""{small.head("cityscapes/net_base_1k")}"""\n\nx = 1\n'
    )


def test_what_is_trained_is_seen(small: Ledger) -> None:
    trained = "python train_net.py --config-file configs/cityscapes/net_own_1k.py"
    rows = [line for line in small.page(trained).splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[-1] for line in rows] == [
        *("not measured |", "see results |", "not measured |", "not measured |")
    ]
    assert "see results" not in small.page("analyzed configs/cityscapes/net_own_1k.py")


def test_names_that_are_not_there(tmp_path: Path, subtests: pytest.Subtests) -> None:
    path = tmp_path / "ledger.yaml"
    for old, new, message in [
        ("net_own_1k: data fast", "net_own_1k: data quick", "quick: not under `settings`"),
        ("net_own_1k: [", "net_gone_1k: [", "cityscapes/net_gone_1k: not under `experiments`"),
        ('{cityscapes/net_own_1k: "', '{cityscapes/a: "', "cityscapes/a: not under `exp"),
    ]:
        with subtests.test(new):
            assert old in SMALL
            path.write_text(SMALL.replace(old, new))
            with pytest.raises(ValueError, match=message):
                Ledger(path)


def test_a_model_without_words(small: Ledger) -> None:
    small.experiments["cityscapes/unknown_base_1k"] = ["data"]
    with pytest.raises(ValueError, match="cityscapes/unknown_base_1k: its model or method"):
        small.head("cityscapes/unknown_base_1k")


def test_heads_and_tables_are_those_of_the_ledger() -> None:
    files = generated(LEDGER, ROOT)
    assert len(files) == len(LEDGER.experiments) + 1
    assert not [path for path, text in files.items() if path.read_text() != text]


def test_the_tool_finds_a_number_that_is_not_the_ledgers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/reproducing.md", tmp_path / "docs")
    main = runpy.run_path(str(ROOT / "tools/reproducing.py"))["main"]
    arguments = ["--root", str(tmp_path)]
    assert main(arguments) == main([*arguments, "--check"]) == 0
    path = tmp_path / "configs/cityscapes/fcn_hrnet48_ms_cs_40k.py"
    right = path.read_text()
    path.write_text(right.replace("81.4", "81.9"))
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert path.read_text() == right
    page = tmp_path / "docs/reproducing.md"
    page.write_text(page.read_text().replace(MARK, ""))
    assert main(arguments) == 1


def test_sources_are_of_the_order_of_authority() -> None:
    for file in LEDGER.experiments:
        for name, setting in LEDGER.settings(file).items():
            first = setting.source.split()[0].rstrip(",")
            kinds = ("paper", "release", "follows", "author", "third-party", "ours")
            assert first in kinds, (file, name)
            assert first != "ours" or setting.remark, (file, name)


def test_what_we_train_ourselves_has_no_published_number() -> None:
    own = [
        path
        for path in (ROOT / "configs").rglob("*.py")
        if path.relative_to(ROOT / "configs").with_suffix("").as_posix() not in LEDGER.experiments
    ]
    assert len(own) > 40
    for path in own:
        head = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert not re.search(r"\d\d\.\d+ mIoU", head), path


def test_ablations_quote_numbers_of_the_table_that_they_name(subtests: pytest.Subtests) -> None:
    quoted = 0
    for path in sorted((ROOT / "configs/ablations").glob("*.yaml")):
        definition = yaml.safe_load(path.read_text())
        if "source" not in definition:
            continue
        with subtests.test(path.name):
            table = re.match(r"(Table \w+(?:\(\w\))?) of (.+?):", definition["source"])
            assert table is not None
            known = {
                number
                for file in LEDGER.experiments
                for row in LEDGER.rows(file)
                if row.table.startswith(table[1])
                and LEDGER.papers[row.paper]["cite"] == table[2].removesuffix(", on Cityscapes")
                for number in re.findall(r"\d+\.\d+", row.text)
            }
            for variant in definition["variants"].values():
                numbers = set(re.findall(r"\d+\.\d+", variant.get("published", "")))
                assert numbers <= known
                quoted += len(numbers)
    assert quoted > 20


def test_the_page_on_models_has_the_papers_parameters() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| [\d.]+ \| (\d+) \|", (ROOT / "docs/models.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 5
    for name, count in rows:
        assert f"{count} million parameters" in LEDGER.published(f"ade20k/{name}")
