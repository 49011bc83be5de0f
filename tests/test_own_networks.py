"""The page that shows how to bring a network: every block of its code, as it stands there, in a short run."""

import re

import jax
import numpy as np
import pytest
from helpers import ROOT

SECTIONS = ("A plain function", "Flax NNX", "Flax Linen", "Equinox")


def run_block(heading):
    """What the block of code under a heading of docs/networks.md defines."""
    page = (ROOT / "docs" / "networks.md").read_text()
    (block,) = re.findall(rf"^#+ {heading}\n.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    namespace = {"__name__": __name__}  # where a dataclass looks for its annotations
    exec(block, namespace)
    return namespace


@pytest.fixture(scope="module")
def trained():
    """Each network taught by the one before it, the first by a plain function that learned alone."""
    train = run_block("Your own network")["train"]
    networks = {section: run_block(section)["network"] for section in SECTIONS}
    teacher, _ = train(networks["A plain function"])
    runs = {}
    for section in (*SECTIONS[1:], SECTIONS[0]):
        runs[section] = teacher, *train(networks[section], teacher)
        teacher = runs[section][1]
    return networks, runs


@pytest.mark.parametrize("section", SECTIONS)
def test_each_kind_of_network_teaches_and_learns(trained, section):
    networks, runs = trained
    _teacher, student, metrics = runs[section]
    assert (metrics["failed_term"] == -1).all()
    for measure in ("accuracy", "agreement"):  # of ten classes
        assert metrics[measure][-10:].mean() > 0.4 > 0.35 > metrics[measure][:3].mean()
    assert metrics["kd/raw"][-10:].mean() < metrics["kd/raw"][:10].mean()
    before, after = (jax.tree.leaves((network.params, network.stats)) for network in (networks[section], student))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    # In evaluation an image's logits are its own: statistics of the batch would tell.
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1))
    evaluate = jax.jit(lambda images: student.forward(images, train=False)[0].logits[0])
    np.testing.assert_allclose(evaluate(images), evaluate(images.at[1:].set(0)), rtol=1e-5, atol=1e-5)
