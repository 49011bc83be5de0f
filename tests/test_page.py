"""The page of a run and of a comparison: whole in itself, with all that it is to tell."""

import json
import re
from html.parser import HTMLParser

import pytest

from gompertz_jax import cli, page, report
from gompertz_jax.training.errors import RunError

TRAIN = {"split": "train", "loss": 1.0, "gradient_norm": 9.0, "accuracy": 0.5, "ce/weight": 1.0, "ce/weighted": 1.0}
TOLD = TRAIN | {"kd/gradient_norm": 2.0, "kd/gradient_cosine": 0.1}
PROVENANCE = {"versions": {"jax": "1.2.3"}, "device": "cpu x 1", "commit": "abc", "timing": {"train_seconds": 3.0}}


class Read(HTMLParser):
    """What refers elsewhere, what was opened and not closed, and the words."""

    def __init__(self, text):
        super().__init__()
        self.elsewhere, self.open, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elsewhere += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elsewhere += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += f" {data}"


def of(directory):
    page.write(directory, directory / "page.html")
    text = (directory / "page.html").read_text()
    read = Read(text)
    assert read.elsewhere == [] and read.open == []
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    return read.words, text.count("<svg ")


def write(directory, lines, **files):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_a_run_that_is_going_and_then_has_ended(tmp_path):
    lines = [{"step": step, **TRAIN, "wasserstein/iterations": 30.0} for step in (0, 10)]
    write(tmp_path, lines, config={"recipe": {"note": "<script>alert(1)</script>"}})
    words, pictures = of(tmp_path)
    assert "Not finished: 10 steps so far." in words and "Sinkhorn iterations" in words and pictures == 2
    assert "Gradient norm" not in words  # that of the whole step is no term's
    assert "<script>alert(1)</script>" in words  # told, not run
    result = {"dataset": "digits", "test_accuracy_last": 0.98765, **PROVENANCE}
    write(tmp_path, [*lines, {"step": 20, **TOLD}], result=result)
    words, pictures = of(tmp_path)
    assert "98.77%" in words and "1.2.3" in words and "Gradient norm" in words and pictures == 3


def test_a_comparison_has_its_tables_arms_and_telemetry(tmp_path):
    term = {"start": 0.0, "middle": 0.5, "end": 1.0, "area": 0.5, "weighted_area": 0.25, "by_progress": True}
    arms = {
        name: {
            "about": f"the arm {name}",
            "objective": {},
            "schedules": {"ce": term | {"curve": [1, 1]}, "kd": term | {"curve": [0, 1]}},
            "students": [
                {
                    "seed": seed,
                    "failed_at_step": None if good + seed else 7,
                    "validation": [[10, 0.5], [20, 0.6]],
                    **({"test_accuracy_last": 0.9 + good * seed / 100} if good + seed else {}),
                }
                for seed in (0, 1)
            ],
        }
        for name, good in (("matched", 1), ("gompertz", 0))
    }
    results = {
        "dataset": "digits",
        "teacher": "big",
        "student": "small",
        "teacher_test_accuracy": 0.99,
        "steps": 20,
        "seeds": [0, 1],
        "order_seed": 0,
        "arms": arms,
        "config": {},
        **PROVENANCE,
        "timing": {"train_seconds": 3.0, "teacher_seconds": 1.0, "images_per_second": 10.0},
    }
    results["comparison"] = report.compared(results, "matched")
    last = results["comparison"]["last"]
    assert last["matched"]["mean"] == pytest.approx(0.905) and last["gompertz"]["n"] == 1
    assert last["gompertz"]["difference"]["mean"] == pytest.approx(-0.01) and results["comparison"]["best"] == {}
    assert "left out: gompertz, seed 0, at step 7." in report.as_markdown(results)
    write(tmp_path, [{"step": 20, "arm": "gompertz", "seed": seed, **TOLD} for seed in (0, 1)], results=results)
    words, pictures = of(tmp_path)
    assert report.PULLS not in words  # of a comparison in which none was measured
    results["pulls"] = {
        "gompertz": {
            name: {"step": [20], "norm": [norm], "pull": [norm], "cosine": [0.25]}
            for name, norm in (("ce", 1.0), ("kd", 0.125))
        }
    }
    write(tmp_path, [{"step": 20, "arm": "gompertz", "seed": seed, **TOLD} for seed in (0, 1)], results=results)
    words, pictures = of(tmp_path)
    assert report.PULLS in words and "0.12" in words and "0.25" in words
    for told in ("90.50 ± 0.71", "-1.00", "baseline", "the arm gompertz", "kd (by progress)", "Gradient norm of each"):
        assert told in words, told
    assert pictures == 2 and "left out: gompertz, seed 0, at step 7." in words


def lines_of_arms():
    train = [{"step": 20, "arm": arm, "seed": seed, **TOLD} for arm in ("kd-0", "kd-1") for seed in (0, 1)]
    held = {"split": "validation", "accuracy": 0.5}
    return [*train, *({"step": 20, "arm": arm, "seed": 0, **held} for arm in ("kd-0", "kd-1"))]


def test_a_comparison_that_is_going_is_told_by_arm(tmp_path):
    write(tmp_path, [], config={"arms": {"kd-0": {}, "kd-1": {}}})
    words, pictures = of(tmp_path)
    assert "Not finished: 0 steps of 2 arms so far." in words and pictures == 0
    write(tmp_path, lines_of_arms(), config={"arms": {"kd-0": {}, "kd-1": {}}})
    words, pictures = of(tmp_path)
    assert "Not finished: 20 steps of 2 arms so far." in words and "Validation accuracy" in words and pictures == 2


def test_a_search_that_has_ended_has_its_table(tmp_path):
    trial = {"trial": 1, "values": {"kd.weight": 0.5}, "validation_accuracy": 0.75}
    tune = {"trials": 2, "search": "sobol", "tuned": {"kd": [trial]}, "config": {}, **PROVENANCE}
    write(tmp_path, lines_of_arms(), config={"arms": {"kd-0": {}, "kd-1": {}}}, tune=tune)
    words, pictures = of(tmp_path)
    assert "2 sobol trials" in words and "75.00" in words and "kd.weight 0.5" in words and pictures == 2


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run and no comparison"):
        page.write(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_lines_that_are_gone_and_a_page_that_cannot_be_written_are_told(tmp_path, capsys):
    write(tmp_path, [], config={})
    (tmp_path / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl in the workdir" in of(tmp_path)[0]
    cli.main(["report", str(tmp_path)])
    assert f"report.html, without curves: {tmp_path} holds no metrics.jsonl" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"no/x.html cannot be written \(No such file or directory\); give another --out$"
    ):
        cli.main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "x.html")])


def test_names_and_numbers_are_told_as_they_are(tmp_path):
    """A folder may be called anything; shares are in percent, and what is not known is left out."""
    directory = tmp_path / "a <b> & 'c'"
    directory.mkdir()
    result = {
        "test_agreement_last": 0.875, "test_accuracy_best": None, "best_step": 12, "not_converged_steps": {},
        "data_sha256": "0123abc", **PROVENANCE,
    }  # fmt: skip
    write(directory, [], config={}, result=result)
    words, _ = of(directory)
    assert words.count(directory.name) == 2  # the title and the heading
    for told in ("test agreement last", "87.50%", "best step", "12", "data_sha256", "0123abc", "cpu x 1", "abc"):
        assert told in words, told
    assert "test accuracy best" not in words and "not converged" not in words and "None" not in words


def test_what_was_measured_of_a_term_is_in_the_panel_of_its_name():
    lines = [
        {"step": step, "kd/gradient_norm": 2.0 + step, "kd/gradient_cosine": -0.5, "ot/gradient_norm": 1.0}
        for step in (0, 9)
    ]
    names = ("gradient_norm", "gradient_cosine")
    found = [("arm", "kd", "gradient_cosine"), ("arm", "kd", "gradient_norm"), ("arm", "ot", "gradient_norm")]
    panels = page._telemetry_figure({"arm": lines}, found, names).axes
    assert [axes.get_title() for axes in panels] == [
        f"{t} gradient {n}" for t in ("kd", "ot") for n in ("norm", "cosine")
    ]
    drawn = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in panels]
    assert drawn == [[[2.0, 11.0]], [[-0.5, -0.5]], [[1.0, 1.0]], []]
    assert [axes.get_yscale() for axes in panels] == ["log", "linear"] * 2
    assert panels[1].get_ylim()[0] <= -1 and panels[1].get_ylim()[1] >= 1
    of_run = page._telemetry_figure({"": lines}, [("", *key) for _, *key in found], names).axes
    assert [len(axes.get_lines()) for axes in of_run] == [2, 1]  # all terms of a run in one row
    transport = page._telemetry_figure(
        {"": [{"step": 0, "ot/marginal_error": 1e-3}]}, [("", "ot", "marginal_error")], ("iterations", "marginal_error")
    )
    assert transport.axes[1].get_yscale() == "log"
