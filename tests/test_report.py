"""The result card and the picture of a run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from gompertz_jax import report


def result(best=0.985):
    return {
        "dataset": "digits", "seed": 0, "steps": 1234, "teacher": "resnet14", "student": "resnet8",
        "teacher_test_accuracy": 0.9875, "test_accuracy_last": 0.98, "test_accuracy_best": best,
        "timing": {"train_seconds": 41.2, "teacher_seconds": 17.0, "images_per_second": 4321.0},
    }  # fmt: skip


def test_card_names_networks_accuracies_seconds_and_files():
    card = report.result_card(result(), Path("runs/digits"))
    for part in ("digits, seed 0, 1,234 steps", "resnet14", "98.75%", "98.00% (last step)",
                 "98.50% (best by validation)", "student 41 s, teacher 17 s", "4,321 images/s",
                 "next      gompertz-jax report runs/digits"):  # fmt: skip
        assert part in card
    assert len({len(line) for line in card.splitlines()}) == 1
    assert "checkpoints/, network/ " in card and "test accuracy" in card
    assert "best by validation" not in report.result_card(result(None), Path("runs/digits"))


def test_curves_are_drawn_from_the_metrics_also_with_gaps(tmp_path):
    lines = [
        {"step": step, "split": "train", "loss": 1.0, "accuracy": 0.5, "ce/weight": 1.0,
         "ce/weighted": 2.0 / (step + 1), "kd/weight": step / 10, "kd/weighted": None}
        for step in range(10)
    ]  # fmt: skip
    lines.append({"step": 10, "split": "validation", "accuracy": 0.7, "agreement": 0.8})
    report.save(report.curves(lines), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 2 * image.height
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
    report.save(report.curves([]), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def drawn(axes):
    """What a panel shows: the values of every line by its label."""
    return {line.get_label(): np.asarray(line.get_ydata(), float).tolist() for line in axes.get_lines()}


def test_curves_show_weights_weighted_terms_and_accuracies_where_they_were_written():
    lines = [
        {"step": 0, "split": "train", "loss": 2.0, "accuracy": 0.1, "ce/weight": 1.0, "ce/weighted": 2.0},
        {"step": 1, "split": "train", "loss": 1.0, "accuracy": 0.2, "ce/weight": 0.5, "ce/weighted": 0.5},
        {"step": 2, "split": "validation", "accuracy": 0.7, "agreement": 0.8},
    ]
    weights, terms, accuracy = report.curves(lines).axes
    assert drawn(weights) == {"ce": [1.0, 0.5]} and drawn(terms) == {"ce": [2.0, 0.5]}
    assert drawn(accuracy) == {"training batch": [0.1, 0.2], "validation": [0.7], "agreement with teacher": [0.8]}
    assert [line.get_xdata().tolist() for line in accuracy.get_lines()] == [[0, 1], [2], [2]]


def student_of(seed, validation, test, failed=None):
    return {"seed": seed, "validation": validation, "test_accuracy_last": test, "failed_at_step": failed}


def test_the_picture_of_a_comparison_shows_means_bands_schedules_and_every_seed():
    curve = {"kd": {"curve": [0.0, 0.5, 1.0]}}
    kd = [student_of(0, [(10, 0.5), (20, 0.7)], 0.8), student_of(1, [(10, 0.3), (20, 0.9)], 0.6)]
    failed = student_of(2, [(10, 0.0)], None, failed=12)
    results = {
        "arms": {
            "student": {"schedules": {"ce": {"curve": [1.0]}}, "students": [student_of(0, [(10, 0.4)], 0.5)]},
            "kd": {"schedules": {"ce": {"curve": [1.0]}, **curve}, "students": [*kd, failed]},
        },
        "comparison": {"baseline": "student"}, "teacher": "t", "student": "s", "dataset": "d",
    }  # fmt: skip
    over_steps, weights, points = report.comparison_figure(results).axes
    assert drawn(over_steps) == {"student": [0.4], "kd": pytest.approx([0.4, 0.8])}
    band = over_steps.collections[1].get_datalim(over_steps.transData)
    spread = np.std([0.5, 0.3], ddof=1)
    assert (band.x0, band.x1) == (10, 20)
    assert (band.y0, band.y1) == pytest.approx((0.4 - spread, 0.8 + spread))
    assert drawn(weights) == {"kd": [0.0, 0.5, 1.0]}
    places = [(line.get_xdata(), line.get_ydata()) for line in points.get_lines() if line.get_marker() == "o"]
    assert [(list(x), list(y)) for x, y in places] == [([0.5], [0]), ([0.8, 0.6], [1, 1])]


def test_tables_are_aligned_and_no_p_value_is_zero():
    rows = [("arm", "n"), ("gompertz", "10")]
    assert report.text_table(rows) == ["arm       n", "gompertz  10"]
    assert report.markdown_table(rows) == ["| arm      | n  |", "|----------|----|", "| gompertz | 10 |"]
    difference = {"mean": 0.01, "low": 0.009, "high": 0.011, "p": 4e-7, "p_holm": 0.0012}
    numbers = {"n": 10, "mean": 0.9, "sd": None, "difference": difference}
    assert report.comparison_rows({"last": {"a": numbers}}, "last")[1][-2:] == ("<0.001", "0.001")


def measured_line(step, seed, ce, kd, cosine, arm="kd"):
    return {
        "step": step, "split": "train", "arm": arm, "seed": seed, "ce/weight": 0.5, "ce/gradient_norm": ce,
        "ce/gradient_cosine": 1.0, "kd/weight": 2.0, "kd/gradient_norm": kd, "kd/gradient_cosine": cosine,
    }  # fmt: skip


def test_pulls_are_ratios_of_weighted_gradients_averaged_over_seeds():
    lines = [
        measured_line(9, 0, 4.0, 1.0, 0.5),
        measured_line(9, 1, 2.0, 3.0, 0.3),
        {"step": 10, "split": "validation", "arm": "kd", "seed": 0, "accuracy": 0.5},
        {"step": 10, "split": "train", "arm": "kd", "seed": 0, "ce/weight": 0.5, "kd/weight": 2.0},
        measured_line(19, 0, None, None, None),  # a student that failed
        measured_line(19, 1, 1.0, 1.0, -0.1),
        measured_line(29, 0, None, None, None),
        measured_line(39, 0, 1.0, 1.0, 0.1) | {"kd/weight": None, "ce/weight": None},
        measured_line(49, 0, 0.0, 1.0, 0.0),
    ]
    found = report.pulls({"kd": ["ce", "kd"], "student": ["ce"]}, lines)
    assert list(found) == ["kd"] and list(found["kd"]) == ["ce", "kd"]
    assert found["kd"]["ce"] == {"step": [9, 19], "norm": [3.0, 1.0], "pull": [1.0, 1.0], "cosine": [1.0, 1.0]}
    assert found["kd"]["kd"] == {"step": [9, 19], "norm": [2.0, 1.0], "pull": [3.5, 4.0], "cosine": [0.4, -0.1]}
    assert report.pull_table(found)[1:] == [("kd", "kd", "1 to 2", "3.5 to 4", "-0.10 to 0.40")]


def test_nothing_measured_gives_no_pulls():
    lines = [{"step": 0, "split": "train", "arm": "a", "seed": 0, "ce/weight": 1.0}]
    assert report.pulls({"a": ["ce"]}, lines) == {}


def test_a_comparison_is_tested_as_by_scipy_and_corrected_by_holm():
    rng = np.random.default_rng(0)
    shifts = {"matched": 0.0, "a": 0.02, "b": 0.05, "c": 0.0}
    columns = {name: rng.normal(0.9 + shift, 0.02, 6) for name, shift in shifts.items()}
    arms = {
        n: {"students": [{"test_accuracy_last": float(value)} for value in column]} for n, column in columns.items()
    }
    found = report.compared({"arms": arms}, "matched")["last"]
    tests = {n: stats.ttest_rel(column, columns["matched"]) for n, column in columns.items() if n != "matched"}
    largest = 0.0
    for rank, name in enumerate(sorted(tests, key=lambda name: tests[name].pvalue)):
        largest = max(largest, min(1.0, (3 - rank) * tests[name].pvalue))
        assert found[name]["difference"]["p"] == pytest.approx(tests[name].pvalue)
        assert found[name]["difference"]["p_holm"] == pytest.approx(largest)
    low, high = tests["a"].confidence_interval(0.95)
    row = next(row for row in report.comparison_rows({"last": found}, "last") if row[0] == "a")
    mean = (columns["a"] - columns["matched"]).mean()
    assert row[3:5] == (f"{100 * mean:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}")


def test_card_lists_a_teacher_only_where_there_is_one(tmp_path):
    alone = report.result_card(result() | {"teacher": None, "teacher_test_accuracy": None}, tmp_path)
    assert "teacher/" not in alone and "\n│ teacher" not in alone
    (tmp_path / "teacher").mkdir()
    assert "checkpoints/, network/, teacher/" in report.result_card(result(), tmp_path)


def test_forty_arms_look_different():
    assert len({tuple(report.arm_style(number).items()) for number in range(40)}) == 40


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before_it(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"before")

    class Broken:
        def savefig(self, place, **options):
            Path(place).write_bytes(b"half of a pic")
            raise OSError

    with pytest.raises(OSError):
        report.save(Broken(), path)
    assert path.read_bytes() == b"before"


def test_weighted_terms_of_any_size_and_sign_are_seen_on_one_axis():
    _, terms, _ = report.curves([{"step": 0, "split": "train", "ce/weight": 1.0, "ce/weighted": 1e3}]).axes
    assert terms.get_yscale() == "symlog"


def test_the_weight_that_is_drawn_is_that_of_the_term_of_most_arms():
    def of(**arms):
        listed = {name: {"schedules": dict.fromkeys(("ce", *terms))} for name, terms in arms.items()}
        return report._most_common_term({"arms": listed})

    assert of(student=(), a=("kd",), b=("kd", "transport"), c=("kd", "zero")) == "kd"
    assert of(a=("kd", "transport")) == "transport"  # of as many, the last by name
    assert of(student=()) == ""


def test_results_say_which_seeds_whose_seconds_and_who_failed():
    numbers = {"start": 0.1, "middle": 0.2, "end": 0.3, "area": 0.4, "weighted_area": 0.5, "by_progress": False}
    arms = {
        name: {
            "about": f"about {name}",
            "schedules": {"ce": numbers},
            "students": [student_of(seed, [], 0.9 if failed is None else None, failed=failed) for seed in (3, 4)],
        }
        for name, failed in (("a", None), ("b", 1234))
    }
    results = {
        "arms": arms, "seeds": [3, 4], "steps": 5000, "teacher": "t", "student": "s", "dataset": "d", "order_seed": 7,
        "teacher_test_accuracy": 0.75, "versions": {"jax": "1"}, "device": "cpu x 1", "commit": "abc",
        "timing": {"train_seconds": 3000.0, "teacher_seconds": 20.0, "images_per_second": 9876.0},
    }  # fmt: skip
    results["comparison"] = report.compared(results, "a")
    text = report.as_markdown(results)
    for told in (
        "2 arms, seeds 3 to 4, 5,000 steps each; the teacher has 75.00 % of the test images",
        "3,000 s of training, 20 s of the teacher's, both with compiling; 9,876 images/s of all students",
        "Not finite, and left out: b, seed 3, at step 1,234; b, seed 4, at step 1,234.",
        "(order seed 7)",
    ):
        assert told in text, told
    row = next(line for line in text.splitlines() if line.startswith("| a ") and "ce" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["a", "ce", "0.1", "0.2", "0.3", "0.4", "0.5"]
