"""How a recipe becomes steps, dispatches and evaluations."""

from helpers import tiny_config

from gompertz_jax.training import fit


def test_dispatches_divide_the_steps_and_evaluation_follows_the_epochs():
    config = tiny_config()
    for count, batch, epochs in ((1337, 96, 3), (45_000, 128, 7), (353 * 8, 8, 5)):
        config.recipe.update({"batch_size": batch, "epochs": epochs})
        plan = fit.Plan.of(config.recipe, config, count)
        assert plan.steps == epochs * (count // batch)
        assert plan.steps % plan.steps_per_dispatch == 0
        ends = range(plan.steps_per_dispatch, plan.steps + 1, plan.steps_per_dispatch)
        assert sum(map(plan.evaluates_at, ends)) == epochs
        assert plan.evaluates_at(plan.steps)
