"""Configs: each is whole, and what cannot be right is refused by name."""

import importlib.util

import pytest
from helpers import ROOT

from gompertz_jax.training import config as room
from gompertz_jax.training import objectives
from gompertz_jax.training.check_config import check_config
from gompertz_jax.training.errors import RunError

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
METHODS = sorted(path for path in (ROOT / "configs" / "methods").glob("*.py") if path.stem != "base")

# The cross-entropy's weight beside each method, from the papers and their code, not from the configs.
CROSS_ENTROPY = {
    "at": 1.0,  # RepDistiller's script, gamma; mdistiller's defaults have the same for all that they share
    "cc": 1.0,
    "crd": 1.0,
    "dist": 1.0,  # the paper's alpha
    "dkd": 1.0,  # mdistiller, DKD.CE_WEIGHT
    "fitnet": 1.0,
    "gradient_attention": 1.0,
    "jacobian": 1.0,
    "kd": 0.1,  # RepDistiller's script, -r 0.1; mdistiller, KD.LOSS.CE_WEIGHT
    "logit_standardization": 0.1,  # mdistiller's KD.LOSS.CE_WEIGHT, which its commands leave
    "mlkd": 0.1,  # KD.LOSS.CE_WEIGHT of the authors' copy of mdistiller
    "nst": 1.0,
    "pkt": 1.0,
    "reviewkd": 1.0,  # --ce-loss-weight, REVIEWKD.CE_WEIGHT
    "rkd": 1.0,
    "sobolev": 1.0,
    "sp": 1.0,
    "vid": 1.0,
    "wkd_f": 1.0,  # WKD.LOSS.CE_WEIGHT
    "wkd_l": 1.0,
}


def config_of(path, *variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole_and_documented(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent.parent))
    config = config_of(path)
    check_config(config)
    objective = objectives.build_objective(config, 1000)
    assert [term.name for term in objective.terms] == ["ce", "gradient", "kd", "wasserstein"]
    assert f"python train.py --config configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("variant", ["digits", "cifar100"])
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_method_is_whole_at_its_published_weights(path, variant, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    config = config_of(path, variant)
    check_config(config)
    assert config.data.name == variant
    built = objectives.build_objective(config, 240)
    assert built.terms[0].name == "ce" and len(built.terms) > 1
    for name, spec in config.objective.terms.items():
        published = objectives.LOSSES[spec.loss].weight
        if spec.loss == "cross_entropy":
            assert float(spec.weight) == CROSS_ENTROPY[path.stem]
        elif published and path.stem != "logit_standardization":  # whose weight of soft targets is 9
            assert spec.weight == published, name
    assert f"python train.py --config configs/methods/{path.name}[:cifar100]" in path.read_text()


def test_the_methods_name_every_loss_that_is_published(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    used = {spec.loss for path in METHODS for spec in config_of(path).objective.terms.values()}
    assert {name for name, loss in objectives.LOSSES.items() if loss.weight} <= used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.model": "resnet21"}, "student.model = 'resnet21'"),
        ({"teacher.model": "vgg"}, "teacher.model = 'vgg'"),
        ({"student.dtype": "float16"}, "student.dtype"),
        ({"recipe.epochs": 0}, "recipe.epochs = 0"),
        ({"recipe.decay": "step"}, "recipe.decay"),
        ({"recipe.decay": "multistep", "recipe.epochs": 100}, "lie beyond training, which has 100 epochs"),
        ({"recipe.decay": "multistep", "recipe.boundaries": (180, 150)}, "must increase"),
        ({"recipe.warmup_epochs": 300.0}, "recipe.warmup_epochs"),
        ({"teacher.recipe.momentum": 1.0}, "teacher.recipe.momentum"),
        ({"teacher.min_accuracy": 93.0}, "is a fraction"),
        ({"teacher.cache.views": -1}, "teacher.cache.views = -1"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch = 0"),
        ({"augment.padding": -1}, "augment.padding"),
        ({"data.image_size": 100_000}, r"data.image_size = 100000: must lie in \[0, 4096\]"),
        ({"data.name": "cifar"}, "data.name = 'cifar'"),
        ({"recipe.weight_decay": float("inf")}, "recipe.weight_decay = inf: must be finite"),
        ({"recipe.projection_rate": -1.0}, "recipe.projection_rate"),
        ({"seed": -1}, "seed = -1"),
        ({"logging.term_gradients_every": -1}, "logging.term_gradients_every"),
        ({"objective.curve": "gompetz()"}, "objective.curve"),
        ({"objective.skip_below": -0.1}, "objective.skip_below = -0.1"),
        ({"data.placement": "gpu"}, "data.placement = 'gpu': must be auto, device or host"),
        ({"teacher.dir": "x" * 300}, "teacher.dir = 'xxx.*: is no path: File name too long"),
        ({"data.name": "folder:~nobody-of-that-name/a"}, "data.name = .*~nobody.*: is no path"),
        ({"init_from": "\0"}, "init_from = .*: is no path"),
        ({"data.device_fraction": 25.0}, "data.device_fraction = 25.0: is a fraction"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes, message):
    config = room.get_default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(RunError, match=message):
        check_config(config)


def test_unknown_keys_and_other_types_are_refused():
    config = room.get_default()
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        config.recipe.epoch = 3
    with pytest.raises(TypeError):
        config.seed = "one"


def test_differing_keys_are_listed_without_those_that_may_change():
    old = {"seed": 0, "recipe": {"epochs": 1}, "logging": {"every_steps": 1}, "data": {"data_dir": "a", "name": "x"}}
    new = {"seed": 1, "recipe": {"epochs": 1}, "logging": {"every_steps": 5}, "data": {"data_dir": "b", "name": "y"}}
    assert room.differing_keys(old, new) == ["data.name: 'x' -> 'y'", "seed: 0 -> 1"]
    assert room.differing_keys({"a": list(range(99)), "b": {}}, {"a": 1}) == [
        f"a: {str(list(range(99)))[:77]}... -> 1",
        "b: missing",
    ]
