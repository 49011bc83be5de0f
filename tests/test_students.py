"""Many students in one program: each is its own run, and the teacher is asked once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gompertz_jax as gj
from gompertz_jax import terms
from gompertz_jax.projections import ClassDistances, Embedding
from gompertz_jax.students import LAYOUTS, Students, grouped, make_comparison_step, stacked

SHAPE, CLASSES, STEPS = (4, 4, 2), 3, 6
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def network(seed, *, width=5, bend=jnp.tanh):
    """A hidden map, bent by `bend`, and linear logits of its mean; gradients at the map by `offsets`."""

    def apply(params, stats, images, *, train, key=None, offsets=None):
        hidden = bend(images @ params["v"])
        hidden = hidden if offsets is None or offsets[0] is None else hidden + offsets[0]
        pooled = (hidden**2).mean((1, 2))
        return gj.Outputs(pooled @ params["w"], (hidden,), pooled), stats

    rng = np.random.default_rng(seed)
    params = {"v": rng.normal(size=(SHAPE[-1], width)), "w": rng.normal(size=(width, CLASSES))}
    return gj.Network(apply, jax.tree.map(jnp.float32, params), {}, 0.5, 0.25)


def batch(data=None, step=0):
    key = jax.random.fold_in(jax.random.key(3), step)
    return {"image": jax.random.uniform(key, (6, *SHAPE)), "label": jnp.arange(6) % CLASSES}


TEACHER, BODY = network(9, width=7), network(0)
CE, KD = gj.gompertz_objective(STEPS, wasserstein_weight=0.0, gradient_weight=0.0).terms
SINKHORN = gj.Term("wasserstein", gj.constant_schedule(0.5), terms.wasserstein)


def gradient(weight, **options):
    known = {key: value for key, value in options.items() if key not in ("every_k_steps", "gradient_stages")}
    rest = {key: value for key, value in options.items() if key not in known}
    loss, of_teacher = partial(terms.gradient_match, pool=1, **known), partial(terms.teacher_gradient, **known)
    return gj.Term("gradient", gj.constant_schedule(weight), loss, of_teacher=of_teacher, **rest)


def objectives():
    """Every way in which a student can read the teacher, and two of one kind that differ in schedules."""
    warm = KD._replace(weight=gj.linear_schedule(STEPS), schedules={"temperature": gj.linear_schedule(STEPS, start=8)})
    followed = KD._replace(weight=gj.by_progress(gj.linear_schedule(1)))
    return [
        gj.Objective((CE,)),
        gj.Objective((CE, KD, SINKHORN, gradient(0.3)), {"last": gj.Projection()}),
        gj.Objective((CE, KD)),
        gj.Objective((CE, followed), progress=gj.Progress(decay=0.5)),
        gj.Objective((CE, gradient(0.5, target="cross_entropy", images=2, stages=(0, 0), gradient_stages=(0, 0)))),
        gj.Objective((CE, gradient(0.5, target="random", every_k_steps=2))),
        gj.Objective((CE, warm)),
    ]


def begun(objective, seed):
    return gj.init_state(network(seed), OPTIMIZER, objective, SHAPE, teacher=TEACHER, key=jax.random.key(seed))


def together(objectives, seeds, *, teacher=TEACHER, **options):
    groups = grouped(objectives)
    states = tuple(stacked([begun(o, seed) for o in group.objectives for seed in seeds]) for group in groups)
    step = make_comparison_step(BODY, OPTIMIZER, groups, make_batch=batch, steps_per_dispatch=STEPS, **options)
    return groups, step, Students(jnp.int32(0), states)


def test_arms_of_the_same_terms_are_a_group_whatever_their_schedules():
    assert [group.arms for group in grouped(objectives())] == [(0,), (1,), (2, 6), (3,), (4,), (5,)]


def test_arms_that_differ_in_one_number_of_an_array_are_two_groups():
    def loss(record, *, matrix):
        return (record.student.logits @ matrix).sum(-1)

    same, other = np.zeros((50, 50), np.float32), np.zeros((50, 50), np.float32)
    other[25, 25] = 7.0
    ce = gj.student_alone().terms[0]
    arms = [
        gj.Objective((ce, gj.Term("x", gj.constant_schedule(1.0), partial(loss, matrix=matrix))))
        for matrix in (same, other, same.copy())
    ]
    assert [group.arms for group in grouped(arms)] == [(0, 2), (1,)]


def test_arms_that_differ_in_the_kind_of_a_projection_are_two_groups():
    """Kinds are tuples of their options, and these are equal."""
    listed = (gj.Term("w", gj.constant_schedule(1.0), partial(terms.gaussian, projection="last")),)
    arms = [gj.Objective(listed, {"last": kind}) for kind in (Embedding(1), ClassDistances(1), Embedding(1))]
    assert [group.arms for group in grouped(arms)] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    "change",
    [
        {"terms": (CE, KD._replace(every_k_steps=2))},
        {"terms": (CE, KD._replace(gradient_stages=(0, 0)))},
        {"terms": (CE, KD._replace(distils=False))},
        {"terms": (CE, KD._replace(name="other"))},
        {"terms": (CE, KD._replace(loss=partial(terms.soft_targets, standardize=True)))},
        {"progress": gj.Progress()},
        {"progress": gj.Progress(decay=0.5)},
    ],
    ids=["how often", "at which stages", "whether it distils", "its name", "its options", "progress", "its decay"],
)
def test_arms_that_differ_in_what_is_computed_are_two_groups(change):
    arm = gj.Objective((CE, KD))
    assert [group.arms for group in grouped([arm, arm._replace(**change), arm])] == [(0, 2), (1,)]


def test_options_of_a_loss_may_be_keys_and_tables():
    def arm(seed):
        options = {"key": jax.random.key(seed), "table": {1: 2, "a": (3, [4])}}
        loss = partial(terms.cross_entropy, **options)
        return gj.Objective((gj.Term("x", gj.constant_schedule(1.0), loss, distils=False),))

    assert [group.arms for group in grouped([arm(0), arm(1), arm(0)])] == [(0, 2), (1,)]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "devices"])
def test_every_student_is_its_own_run(layout):
    """On several devices: test_sharding.py."""
    listed, seeds = objectives() if layout == "map" else objectives()[2:4], (1, 2)
    groups, step, students = together(listed, seeds, layout=layout, term_gradients_every=2)
    students, metrics = step(students, TEACHER, None)
    assert int(students.step) == STEPS
    for group, states, told in zip(groups, students.groups, metrics, strict=True):
        alone = {
            arm: gj.make_train_step(
                BODY, OPTIMIZER, listed[arm], make_batch=batch, steps_per_dispatch=STEPS, term_gradients_every=2
            )
            for arm in group.arms
        }
        for place, (arm, seed) in enumerate((arm, seed) for arm in group.arms for seed in seeds):
            state, expected = alone[arm](begun(listed[arm], seed), TEACHER, None)
            for ours, theirs in zip(jax.tree.leaves(states), jax.tree.leaves(state), strict=True):
                np.testing.assert_allclose(ours[place], theirs, rtol=1e-4, atol=1e-6)
            assert told.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_allclose(told[name][:, place], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_teacher_is_asked_once_for_all_students():
    """Its sine is nobody else's, nor is the cosine of its derivative."""
    teacher = network(9, width=7, bend=jnp.sin)
    listed = [gj.Objective((CE, KD, gradient(0.3))), gj.Objective((CE, gradient(0.2))), gj.Objective((CE, KD))]
    _, step, students = together(listed, (1, 2), layout="unroll")
    program = str(jax.make_jaxpr(lambda students: step(students, teacher, None))(students))
    assert [len(re.findall(rf"= {name} ", program)) for name in ("sin", "cos")] == [1, 1]


def test_a_student_that_fails_stays_where_it_is_and_the_others_go_on():
    broken = KD._replace(weight=lambda step: jnp.where(step == 3, jnp.inf, 1.0))
    whole, hurt = gj.Objective((CE, KD)), gj.Objective((CE, broken))
    _, step, students = together([hurt, whole], (1,))
    after, (metrics,) = step(students, TEACHER, None)
    _, step, students = together([whole], (1,))
    expected, _ = step(students, TEACHER, None)
    (states,), (alone,) = after.groups, expected.groups
    assert states.failed_term.tolist() == [1, -1] and states.failed_step.tolist() == [3, -1]
    assert states.step.tolist() == [3, STEPS] and int(after.step) == STEPS
    np.testing.assert_array_equal(metrics["failed_term"][:, 0], [-1, -1, -1, 1, 1, 1])
    np.testing.assert_allclose(states.params["w"][1], alone.params["w"][0], rtol=1e-5)


def test_mistakes_are_told():
    groups = grouped([gj.Objective((CE, KD))])
    with pytest.raises(ValueError, match="layout must be one of devices, map, vmap, unroll, got 'rows'"):
        make_comparison_step(BODY, OPTIMIZER, groups, layout="rows")
    step = make_comparison_step(BODY, OPTIMIZER, groups)
    students = Students(jnp.int32(0), (stacked([begun(gj.Objective((CE, KD)), 1)]),))
    with pytest.raises(ValueError, match=r"the terms \['kd'\] need a teacher"):
        step(students, None, batch())
