"""The result card and the picture of a run."""

from pathlib import Path

from PIL import Image

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
                 "98.50% (best by validation)", "student 41 (4,321 images/s), teacher 17", "runs/digits/"):  # fmt: skip
        assert part in card
    assert len({len(line) for line in card.splitlines()}) == 1
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
