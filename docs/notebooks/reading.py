# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Reading a run and a comparison
#
# First a short run: digits, four epochs of soft targets, in a folder of its own. `train.py` does the same.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from configs import digits
from gompertz_jax import report
from gompertz_jax.training.loop import train_and_evaluate
from gompertz_jax.training.writer import read_metrics

config = digits.get_config()
config.teacher.recipe.epochs, config.recipe.epochs = 3, 4
config.teacher.model = config.student.model = "resnet8"
config.teacher.min_accuracy = 0.3
config.evaluate_every_epochs = 1
config.objective.terms.wasserstein.weight = "0"  # these two take longest to compile
config.objective.terms.gradient.weight = "0"
config.logging.term_gradients_every = 16
config.logging.progress = False

workdir = Path(tempfile.mkdtemp()) / "run"
result = train_and_evaluate(config, workdir)

# %% [markdown]
# ## The result
#
# `result.json` has what the run is made of beside what came out of it.

# %%
print(sorted(path.name for path in workdir.iterdir()))
for key in ("teacher_test_accuracy", "test_accuracy_last", "test_accuracy_best", "best_step", "steps", "commit"):
    print(f"{key:24}{result[key]}")
assert result == json.loads((workdir / "result.json").read_text())

# %% [markdown]
# ## The metrics
#
# A line is a step, or an evaluation after so many steps; every term is there raw and weighted.

# %%
lines = read_metrics(workdir / "metrics.jsonl")
training = [line for line in lines if line["split"] == "train"]
for line in training[:: len(training) // 5]:
    print(f"step {line['step']:3d}  weight {line['kd/weight']:.3f}  raw {line['kd/raw']:.3f}  loss {line['loss']:.3f}")

# %% [markdown]
# With `logging.term_gradients_every` some steps also say how strongly every raw term pulls, and in which direction
# against the cross-entropy:

# %%
for line in (line for line in training if "kd/gradient_norm" in line):
    norms = {name: line[f"{name}/gradient_norm"] for name in ("ce", "kd")}
    print(
        f"step {line['step']:3d}: batch accuracy {line['accuracy']:.1%}, "
        f"norms {norms['ce']:.2f} and {norms['kd']:.2f}, cosine {line['kd/gradient_cosine']:.2f}"
    )

# %% [markdown]
# The run has drawn its curves; `report.curves(lines)` is the same as a Matplotlib figure.

# %%
Image.open(workdir / "curves.png")

# %% [markdown]
# ## A comparison
#
# This one is kept in the repository: eight arms on digits, five seeds each. Its record holds every student, so that any
# table can be made from it anew, here with another baseline than it was made with.

# %%
root = next(path for path in (Path.cwd(), *Path.cwd().parents) if (path / "results").is_dir())
comparison = json.loads((root / "results" / "compare_digits" / "results.json").read_text())
comparison["comparison"] = report.compared(comparison, "student")
print("\n".join(report.text_table(report.comparison_rows(comparison["comparison"], "last"))))

# %% [markdown]
# What one arm's seeds have, and how two arms differ seed by seed:

# %%
by_arm = {
    name: np.array([student["test_accuracy_last"] for student in arm["students"]])
    for name, arm in comparison["arms"].items()
}
print("gompertz - matched, by seed:", (100 * (by_arm["gompertz"] - by_arm["matched"])).round(2))

# %%
report.save(report.comparison_figure(comparison), workdir / "comparison.png")
Image.open(workdir / "comparison.png")
