"""Schedules before a run: numbers in closed form, and each doubt where it belongs and nowhere else."""

import numpy as np
import pytest
from helpers import ROOT, tiny_config
from scipy.special import exp1

from gompertz_jax import cli
from gompertz_jax import preview as room
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.objectives import QUARTERS


def config(curve="gompertz(displacement=5, rate=8)", **changes):
    return tiny_config(**{"objective.curve": curve, "recipe.epochs": 40, "recipe.warmup_epochs": 0.0} | changes)


def test_the_default_curve_is_read_in_closed_form():
    shown = room.preview(config())
    summary = shown.summaries["curve"]
    tau = np.array(QUARTERS)
    np.testing.assert_allclose(summary.at_quarters, np.exp(-5 * np.exp(-8 * tau)), atol=1e-3)
    np.testing.assert_allclose(summary.area, (exp1(5 * np.exp(-8)) - exp1(5)) / 8, atol=1e-3)
    np.testing.assert_allclose(summary.steepest, np.log(5) / 8, atol=2e-3)
    fine = (np.arange(100_000) + 0.5) / 100_000
    rate = 1 + np.cos(np.pi * fine)
    np.testing.assert_allclose(
        summary.weighted_area, (np.exp(-5 * np.exp(-8 * fine)) * rate).sum() / rate.sum(), atol=1e-3
    )
    assert summary.direction == "rises"
    assert shown.summaries["ce"].direction == "constant" and shown.summaries["ce"].steepest is None
    assert shown.summaries["kd"] == summary
    assert set(shown.values) == {
        "curve",
        "ce",
        "kd",
        "kd.temperature",
        "wasserstein",
        "wasserstein.epsilon",
        "gradient",
    }
    assert shown.warnings == []


def test_the_numbers_are_those_of_the_run_s_own_steps():
    """Of few steps the mean is another one: the last of n steps is (n - 1) / n of training."""
    short = config(**{"recipe.epochs": 2, "recipe.batch_size": 64})
    shown = room.preview(short)
    steps = 2 * ((1438 - short.data.validation) // 64)
    assert shown.steps == steps and all(len(values) == steps for values in shown.values.values())
    mean = np.exp(-5 * np.exp(-8 * np.arange(steps) / steps)).mean()
    np.testing.assert_allclose(shown.summaries["curve"].area, mean, rtol=1e-5)
    assert abs(mean - (exp1(5 * np.exp(-8)) - exp1(5)) / 8) > 0.01
    assert f"mean: over {steps} steps of 2 epochs" in room.as_text(shown)
    assert "mean: over 1,000 points" in room.as_text(shown._replace(steps=None))


def test_a_picture_of_several_schedules_is_in_percent_and_a_negative_weight_is_told():
    shown = room.preview(
        config(**{"objective.terms.wasserstein.weight": "0.5", "objective.terms.gradient.weight": "0"})
    )
    assert room.as_text(shown).splitlines()[1].startswith(f"{shown.values['curve'].max():>8.3g} ┤")  # of curve and kd
    shown = room.preview(config(**{"objective.terms.kd.weight": "-2 * curve"}))
    assert "kd: the weight is -0.0135 at step 0; below 0 the term is made larger, not smaller" in shown.warnings
    assert "   100 % ┤" in room.as_text(room.preview(config()))


@pytest.mark.parametrize(
    ("curve", "direction", "steepest"),
    [
        ("reversed(gompertz())", "falls", 1 - np.log(5) / 8),
        ("linear(start=0, end=1)", "rises", None),
        ("cosine(start=1, end=0)", "falls", 0.5),
        ("logistic(midpoint=0.3)", "rises", 0.3),
        ("gompertz(displacement=0.5)", "rises", None),  # without an inflection: steepest at the start
        ("gompertz() * cosine(start=1, end=0)", "turns", None),
        ("0.7", "constant", None),
    ],
)
def test_direction_and_steepest_point(curve, direction, steepest):
    summary = room.preview(config(curve)).summaries["curve"]
    assert summary.direction == direction
    if direction != "turns":
        assert summary.steepest == (None if steepest is None else pytest.approx(steepest, abs=3e-3))


@pytest.mark.parametrize(
    ("curve", "warning"),
    [
        ("gompertz(rate=200)", "curve: 100% of its largest value is reached before 5% of training"),
        ("gompertz(displacement=5, rate=0.2)", "write rate=8 for 40 epochs"),
        ("gompertz(displacement=5, rate=0.2)", "never passes half of its asymptote of 1; its largest value is 0.01"),
        ("gompertz(asymptote=4, displacement=5, rate=1.5)", "never passes half of its asymptote of 4"),
        ("0.5 * logistic(midpoint=2)", "never passes half of its asymptote of 0.5"),
        ("gompertz_through(inflection=0.99, final=0.4)", "never passes half of its asymptote of 1"),
        ("reversed(gompertz(displacement=5, rate=0.9))", "never passes half of its asymptote of 1"),
        ("matched(gompertz(rate=1.5)) * linear(start=0, end=1)", None),
        ("0.3 * gompertz()", None),
        ("gompertz(asymptote=0.4)", None),
        ("0.3", None),
        ("gompertz()", None),
        ("matched(gompertz())", None),
        ("linear(start=1, end=0)", None),
        ("cosine(start=1, end=0)", None),  # that it is largest at the start is what it is for
        ("gompertz(rate=40)", None),  # at 5 % of training it has reached 51 %
        ("gompertz(rate=2)", None),  # ends at 51 % of its asymptote
    ],
)
def test_doubtful_curves_are_told_and_others_are_not(curve, warning):
    warnings = room.preview(config(curve)).warnings
    if warning is None:
        assert warnings == []
    else:
        assert any(warning in text for text in warnings)


def test_the_steepest_point_is_told_as_an_epoch_and_as_a_step_where_the_size_is_known():
    digits = config()  # 1,438 images less 100 that are held out, batches of 96: 13 steps an epoch
    assert f"at 20.1%, epoch 8.0, step {np.ceil(np.log(5) / 8 * 520):.0f}\n" in room.as_text(room.preview(digits))
    part = config(**{"data.train_images": 200})
    assert room.preview(part).steps == 80
    own = config(**{"data.name": "arrays:images.npz"})
    assert room.preview(own).steps is None
    assert "at 20.1%, epoch 8.0\n" in room.as_text(room.preview(own)) + "\n"


def test_areas_are_compared_with_a_control_s():
    gompertz, matched, constant = config(), config("matched(gompertz(displacement=5, rate=8))"), config("1")
    terms = ("curve", "kd", "wasserstein", "gradient")
    assert [w for w in room.preview(matched, control=gompertz).warnings if ": area" in w] == []
    warned = room.preview(constant, control=gompertz).warnings
    assert {w.split(":")[0] for w in warned if ": area" in w} == set(terms)
    # of equal area, and yet not of equal area by learning rate: a late weight meets small steps
    assert any(w.startswith("kd: weighted area") for w in room.preview(matched, control=gompertz).warnings)
    alone = config(**{"objective.terms.gradient.weight": "0"})
    assert "gradient: only the control has it" in room.preview(alone, control=gompertz).warnings


def test_text_and_picture_hold_every_schedule(tmp_path):
    shown = room.preview(config("progress(gompertz())"))
    text = room.as_text(shown)
    for part in ("by progress, drawn as if", "kd.temperature", "50%", "at 20.", "█"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith("curve, gradient, kd, wasserstein (by")  # one shape, one picture
    column = [line[10:] for line in text.splitlines() if "┤" in line][: room.HEIGHT]
    heights = [sum(room.BARS.index(row[i]) for row in column if i < len(row)) for i in range(room.WIDTH)]
    tau = np.linspace(0, 1, room.WIDTH)
    np.testing.assert_allclose(np.array(heights) / (8 * room.HEIGHT), np.exp(-5 * np.exp(-8 * tau)), atol=0.02)
    room.plot(shown, tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_would_refuse_is_refused():
    with pytest.raises(RunError, match=r"objective\.curve"):
        room.preview(config("gompetz()"))
    with pytest.raises(RunError, match=r"recipe\.epochs"):
        room.preview(config(**{"recipe.epochs": 0}))


DIGITS = str(ROOT / "configs" / "digits.py")


def test_the_command_takes_a_config_file_and_changes(tmp_path, capsys):
    picture = tmp_path / "schedules.png"
    cli.main(["preview", f"--config={DIGITS}", "--config.objective.curve=gompertz(rate=0.2)", f"--png={picture}"])
    out = capsys.readouterr().out
    assert "write rate=12 for 60 epochs" in out and "wasserstein.epsilon" in out
    assert picture.exists()
    cli.main(["preview", "--config", DIGITS, "--control", DIGITS])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config: there is no file nowhere.py"),
        ([f"--config={DIGITS}", "--control=nowhere.py"], "--control: there is no file nowhere.py"),
        ([f"--config={DIGITS}:foo"], f"{DIGITS} takes no variant, got ':foo'"),
        ([f"--config={DIGITS}", "--config.recipe.epoch=3"], "there is no key 'epoch'; did you mean 'epochs'?"),
        ([f"--config={DIGITS}", "--config.recipe.epochs=many"], "--config.recipe.epochs=many: must be an integer"),
        ([f"--config={DIGITS}", "--config.recipe.nesterov=no"], "--config.recipe.nesterov=no: must be True or False"),
        (
            [f"--config={DIGITS}", "--png=no/x.png"],
            "no/x.png cannot be written (No such file or directory); give another",
        ),
        ([f"--config={DIGITS}", "stray"], "unexpected argument 'stray'"),
        ([f"--config={DIGITS}", "--config.objective.curve=gompetz()"], "objective.curve = 'gompetz()'"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["preview", *arguments])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)


BEGIN = "from gompertz_jax.training.config import get_default\ndef get_config():\n  config = get_default()\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config()\n  pass\n", ", line 1: expected ':'"),
        ("import no_such\n", ", line 1, import no_such: ModuleNotFoundError: No module named 'no_such'"),
        (
            BEGIN + "  config.recipe.epochs = '3'",
            ", line 4, config.recipe.epochs = '3': epochs must be of type int, got 3",
        ),
        (
            BEGIN + "  config.recipe.epoch = 3",
            ", line 4, config.recipe.epoch = 3: there is no key 'epoch'; did you mean 'epochs'?",
        ),
        (BEGIN + "  config.recipe.colour = 3", ", line 4, config.recipe.colour = 3: there is no key 'colour'"),
        (BEGIN + "  return 1 / 0", ", line 4, return 1 / 0: ZeroDivisionError: division by zero"),
        (BEGIN, ": get_config() must return a ConfigDict, got None"),
        ("", " has no get_config(), the function that returns the config"),
        ("def get_config(variant):\n  pass\n", " needs a variant: "),
    ],
)
@pytest.mark.parametrize("changes", [[], ["--config.seed=3"]], ids=["as it is", "changed"])
def test_mistakes_in_a_config_file_are_one_line_that_says_where(source, message, changes, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["preview", f"--config={path}", *changes])
    assert str(stopped.value).startswith(f"error: {path}{message}") and "\n" not in str(stopped.value)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_a_schedule_of_any_size_and_of_any_number_of_steps_is_read_alike(factor):
    """float32 rounds more than two of a million steps differ by."""
    for steps in (500, 1_000_000):
        tau = np.arange(steps) / steps
        summary = room.schedule_summary(np.float32(factor * np.exp(-5 * np.exp(-8 * tau))), 1 - tau)
        assert summary.direction == "rises"
        assert summary.steepest == pytest.approx(np.log(5) / 8, abs=3e-3)
        values = factor * np.exp(-5 * np.exp(-8 * tau))
        assert summary.area == pytest.approx(values.mean(), rel=1e-5)
        assert summary.weighted_area == pytest.approx((values * (1 - tau)).sum() / (1 - tau).sum(), rel=1e-5)
    assert room.schedule_summary(np.array([1.0, 3.0]), np.zeros(2)).weighted_area == 2.0  # where the rate says nothing


def test_an_area_within_a_hundredth_of_the_control_s_is_equal():
    for factor, told in ((1.008, False), (1.05, True), (0.95, True)):
        warned = room.preview(config(f"{factor} * gompertz()"), control=config("gompertz()")).warnings
        assert any(text.startswith("curve: area") for text in warned) is told, factor


def test_schedules_share_a_picture_only_if_they_are_of_one_shape_one_sign_and_one_clock():
    changes = {"objective.terms.kd.weight": "-2 * curve", "objective.terms.gradient.weight": "progress(linear())",
               "objective.terms.wasserstein.weight": "3 * curve"}  # fmt: skip
    shown = room.preview(config("linear()", **changes))
    assert [names for names, _ in room._shapes(shown)] == [["curve", "wasserstein"], ["gradient"], ["kd"]]
    low = [line for line in room.as_text(shown).splitlines() if "┤" in line][-1]
    assert low.startswith(f"{shown.values['kd'].min():>8.3g} ┤")
