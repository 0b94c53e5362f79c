"""Loading experiment files and the overrides of the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate

from contrast_d2 import get_config
from contrast_d2.engine import argument_parser, import_modules, load_config

YAML = str(Path(__file__).parents[2] / "configs/camvid/semfpn_r18_base_6k.yaml")
OFFLINE = ["MODEL.BACKBONE.OPTIONS.PRETRAINED", "False"]
CONFIG = str(Path(__file__).parents[2] / "configs/shapes/semfpn_r18_ms_cs_demo.py")


def test_overrides_reach_every_level_and_type() -> None:
    cfg = load_config(
        CONFIG,
        [
            "train.max_iter=7",
            "optimizer.lr=1e-3",
            "model.contrast.scale_weights.res3=0",
            "dataloader.train.mapper.augmentations.crop_size=[64,96]",
            "model.contrast.cross_scale.0.2=0.5",
            "train.output_dir=some/folder",
        ],
    )
    assert cfg.train.max_iter == 7
    assert cfg.optimizer.lr == 1e-3
    assert cfg.model.contrast.scale_weights.res3 == 0
    assert cfg.dataloader.train.mapper.augmentations.crop_size == [64, 96]
    assert cfg.model.contrast.cross_scale[0][2] == 0.5
    assert cfg.dataloader.evaluator.output_dir == "some/folder/inference/shapes_sem_seg_val"


@pytest.mark.parametrize("none", ["None", "null"])
def test_none_switches_the_contrast_off(none: str) -> None:
    assert load_config(CONFIG, [f"model.contrast={none}"]).model.contrast is None


def test_one_key_contrasts_across_processes() -> None:
    cfg = load_config(CONFIG, ["model.contrast.across_processes=True"])
    contrast = instantiate(cfg.model).contrast
    assert contrast.across_processes


def test_arguments_that_the_config_leaves_at_their_default_can_be_set() -> None:
    cfg = load_config(CONFIG, ["model.contrast.norm=layer", "model.backbone.norm_outputs=True"])
    assert cfg.model.contrast.norm == "layer"
    assert cfg.model.backbone.norm_outputs is True


def test_a_wrong_override_is_told(subtests: pytest.Subtests) -> None:
    for override, message in [
        ("model.contrst.temperature=0.2", "model.contrast.temperature"),
        ("train.max_iters=3", r"train\.max_iters.*train\.max_iter\b"),
        ("model.contrast.temprature=0.2", "model.contrast.temperature"),
        ("model.backbone.drop_path=0.1", "model.backbone.drop_path_rate"),
        ("optimizer.lr.x=1", "optimizer.lr.x.*optimizer.lr "),
        ("model.contrast.cross_scale.7.2=1", "is a list of 2"),
        ("train.max_iter", "'train.max_iter'"),
        ("--resume", "--resume"),
        ("~train.seed", "'~train.seed'.*key=value"),
        ("train.seed=1,2", "'train.seed=1,2'.*key=value"),
        ("train.output_dir=a:b(", r"'train.output_dir=a:b\('"),
    ]:
        with subtests.test(override=override):
            with pytest.raises(ValueError, match=message):
                load_config(CONFIG, [override])


def test_a_key_under_none_is_told() -> None:
    with pytest.raises(ValueError, match="model.contrast is None"):
        load_config(CONFIG, ["model.contrast=None", "model.contrast.temperature=0.2"])


@pytest.mark.parametrize("path", ["", "configs/no_such_file.py"])
def test_a_missing_config_file_is_told(path: str) -> None:
    with pytest.raises(ValueError, match="--config-file"):
        load_config(path)


def test_the_saved_yaml_loads_as_the_same_config(tmp_path: Path) -> None:
    cfg = load_config(CONFIG, ["train.max_iter=9"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    loaded = load_config(str(tmp_path / "config.yaml"), ["train.seed=4"])
    assert loaded.train.max_iter == 9
    assert loaded.train.seed == 4
    assert loaded.model.contrast.scale_weights == cfg.model.contrast.scale_weights


def test_detectron2s_yaml_takes_keys_and_values() -> None:
    overrides = ["SOLVER.MAX_ITER", "9", *OFFLINE, "OUTPUT_DIR", "a/b"]
    cfg = load_config(YAML, overrides)
    assert (cfg.train.max_iter, cfg.train.output_dir) == (9, "a/b")
    assert cfg.model.cfg.MODEL.BACKBONE.OPTIONS.PRETRAINED is False
    assert cfg.dataloader.evaluator.output_dir == "a/b/inference/camvid_sem_seg_val"


def test_what_a_run_of_detectron2s_yaml_saves_is_a_lazy_config(tmp_path: Path) -> None:
    cfg = load_config(YAML, OFFLINE)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    loaded = load_config(str(tmp_path / "config.yaml"), ["train.seed=4", "optimizer.lr=0.5"])
    assert (loaded.train.seed, loaded.optimizer.lr) == (4, 0.5)
    weights = [instantiate(c.model).state_dict() for c in (cfg, loaded)]
    assert {k: v.shape for k, v in weights[0].items()} == {
        k: v.shape for k, v in weights[1].items()
    }


def test_a_wrong_override_of_detectron2s_yaml_is_told(subtests: pytest.Subtests) -> None:
    for overrides, message in [
        (["SOLVER.MAX_ITERS", "3"], r"SOLVER.MAX_ITERS.*SOLVER.MAX_ITER\b"),
        (["MODEL.BACKBONE.OPTIONS.NAMES", "x"], "MODEL.BACKBONE.OPTIONS.NAMES"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch.*SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER: .*KEY VALUE"),
        (["train.max_iter=3"], "train.max_iter=3: .* KEY VALUE"),
        (["SOLVER.MAX_ITER", "3", "--resume"], "--resume"),
        (["MODEL.CONTRAST.OPTIONS.SCALE_WEIGHTS", "{res2: 1}"], "{res2: 1}.*'res2': 1"),
    ]:
        with subtests.test(overrides=overrides):
            with pytest.raises(ValueError, match=message):
                load_config(YAML, overrides)


def test_a_wrong_yaml_file_is_told(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for text, message in [
        ("", "keys"),
        ("- a\n- b\n", "keys"),
        ("MODEL: {\n", "yaml"),
        ("_BASE_: no.yaml\nSEED: 1\n", "no.yaml"),
        ("MODEL:\n  BACKBON:\n    NAME: x\n", "MODEL.BACKBON[^E]"),
        ("SOLVER:\n  MAX_ITER: soon\n", "Type mismatch"),
        ("SOLVER: 3\n", "Type mismatch"),
    ]:
        with subtests.test(text=text):
            path = tmp_path / "x.yaml"
            path.write_text(text)
            with pytest.raises(ValueError, match=message) as error:
                load_config(str(path))
            assert str(path) in str(error.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, left as it was with the import path and the modules."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["parts_of_mine", "nested/parts_of_mine.py", "package.parts"])
def test_modules_are_imported_by_name_and_by_path(folder: Path, name: str) -> None:
    file = folder / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("import os\nos.environ['PARTS'] = __name__\nclass Mine: pass\n")
    args = argument_parser().parse_args(["--import", name, "--import", "json", "SOLVER.GAMMA", "1"])
    assert args.opts == ["SOLVER.GAMMA", "1"]
    import_modules(args.imports)
    module = Path(name).stem if name.endswith(".py") else name
    assert os.environ.pop("PARTS") == module
    # Under the name by which a data worker, or a saved config, finds it again.
    assert instantiate({"_target_": f"{module}.Mine"}).__module__ == module
    (folder / "experiment.py").write_text(
        f"from detectron2.config import LazyCall as L\nfrom {module} import Mine\n"
        "model = dict(backbone=L(Mine)())\n"
    )
    cfg = load_config(str(folder / "experiment.py"))
    assert type(instantiate(cfg.model.backbone)).__name__ == "Mine"


def test_modules_that_are_not_there_are_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="--import no_such_module"):
        import_modules(["no_such_module"])
    with pytest.raises(ValueError, match="--import x/y.py: there is no such module"):
        import_modules(["x/y.py"])
    (folder / "json.py").write_text("")
    with pytest.raises(ValueError, match="the name json is taken by"):
        import_modules(["json.py"])
    (folder / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):  # its own mistake
        import_modules(["broken"])


def test_a_dict_takes_the_place_of_a_dict() -> None:
    cfg = load_config(CONFIG, ["model.contrast.scale_weights={}"])
    assert cfg.model.contrast.scale_weights == {}
    cfg = load_config(CONFIG, ["model.contrast.scale_weights={res3:0.5}"])
    assert cfg.model.contrast.scale_weights == {"res3": 0.5}


def test_an_experiment_anywhere_builds_on_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from contrast_d2 import get_config\n"
        "_base = get_config('shapes/semfpn_r18_ms_cs_demo.py')\n"
        "dataloader, dataset, model = _base.dataloader, _base.dataset, _base.model\n"
        "lr_multiplier, optimizer, train = _base.lr_multiplier, _base.optimizer, _base.train\n"
        "model.contrast.temperature = 0.3\n"
        "train.output_dir = 'output/mine'\n"
    )
    cfg = load_config(str(path), ["train.max_iter=5"])
    expected = load_config(CONFIG, ["train.max_iter=5", "train.output_dir=output/mine"])
    expected.model.contrast.temperature = 0.3
    assert cfg == expected
    # Interpolations are of the whole config that they are now in.
    assert cfg.dataloader.evaluator.output_dir == "output/mine/inference/shapes_sem_seg_val"
    with pytest.raises(ValueError, match="'camvid/semfpn_r18_b"):
        get_config("camvid/semfpn_r18_bas_6k.py")
