"""The table of studies: what each asks, trains, tunes, repeats and reports.

``engine`` runs a row, ``scores`` computes its numbers from the stored tables, and ``figures`` draws
them. PLAN.md says why each is as it is. Old names of studies are aliases.
"""

import dataclasses
from typing import Any

from gipo_jax.config import KERNELS

from . import (
    age,
    engine,
    evidence,
    flow,
    metaworld,
    mismatch,
    scores,
    selection,
    sequences,
    switch,
    width,
)
from .engine import Study
from .exact import bounds, gridworld, reuse_bias, sequence_bias, weights
from .tasks import (
    ACROBOT,
    ASTERIX,
    BREAKOUT,
    CARTPOLE,
    CATCH,
    FOUR_ROOMS,
    GIPO,
    GIPO_02,
    GIPO_05,
    INVADERS,
    NO_CLIP,
    PENDULUM,
    PPO,
    REACHER,
    REGIMES,
    SAPO,
    SIX,
    Method,
    Part,
    Scale,
    Task,
    replay,
    windows,
)

PRESETS = ("quick", "committed", "full")
"""Scales: a check in minutes, the results in this repository, and what a GPU should run."""


def by_unit(study: Study, scale: Scale, order: list[tuple[str, Task]]) -> list[Part]:
    """A part for each regime and task of ``order``."""
    return [
        Part(
            folder=f"{{}} {regime} {task.env}",
            keys={"regime": regime, "env": task.env},
            regime=regime,
            tasks=(task,),
            methods=scale.methods or study.methods,
            cells=scale.cells,
        )
        for regime, task in order
    ]


def regimes_first(study: Study, scale: Scale) -> list[Part]:
    """All tasks at high reuse, then at low: staleness should matter most in the first."""
    order = [(regime, task) for regime in reversed(REGIMES) for task in scale.tasks]
    return by_unit(study, scale, order)


def tasks_first(study: Study, scale: Scale) -> list[Part]:
    """Both regimes of a task, then those of the next."""
    order = [(regime, task) for task in scale.tasks for regime in reversed(REGIMES)]
    return by_unit(study, scale, order)


def balanced(study: Study, scale: Scale) -> list[Part]:
    """As ``tasks_first``, in an order in which two equal shares take about as long."""
    both = list(reversed(REGIMES))
    order = [
        (regime, task)
        for number, task in enumerate(scale.tasks)
        for regime in (both if number % 2 == 0 else reversed(both))
    ]
    return by_unit(study, scale, order)


def as_the_authors(study: Study, scale: Scale) -> list[Part]:
    """``regimes_first`` with the authors' KL and optimizer, scored by fresh episodes."""
    return [
        dataclasses.replace(part, settings=width.AUTHORS) for part in regimes_first(study, scale)
    ]


def high_reuse(study: Study, scale: Scale) -> list[Part]:
    """Every task at high reuse."""
    return by_unit(study, scale, [("reuse-heavy", task) for task in scale.tasks])


def _together(study: Study, scale: Scale, folder: str, **keys: Any) -> Part:
    """All tasks of a scale at high reuse in one sweep."""
    methods = scale.methods or study.methods
    tasks, cells = scale.tasks, scale.cells
    return Part(
        folder=folder, keys=keys, regime="reuse-heavy", tasks=tasks, methods=methods, cells=cells
    )


def in_one(study: Study, scale: Scale) -> list[Part]:
    """All tasks in one sweep."""
    keys = {"regime": "reuse-heavy"} if study.by else {}
    return [_together(study, scale, study.name, **keys)]


def by_task(study: Study, scale: Scale) -> list[Part]:
    """A sweep for each task."""
    return [
        dataclasses.replace(
            _together(study, scale, f"{study.name} {task.env}", env=task.env), tasks=(task,)
        )
        for task in scale.tasks
    ]


def by_setting(setting: str, *values: str) -> Any:
    """A sweep for each value of a static setting, which is a column of its rows."""

    def parts(study: Study, scale: Scale) -> list[Part]:
        return [
            dataclasses.replace(
                _together(study, scale, f"{study.name}_{number}", **{setting: value}),
                settings={setting: value},
            )
            for number, value in enumerate(values)
        ]

    return parts


KEYS = (*engine.KEYS, "seed", "status", "learning_rate")
WIDTH_KEYS = ("regime", "env", "objective", "width", "age", "learning_rate", "seed", "status")

RATES = (3e-4, 1e-3, 3e-3)
MORE_RATES = (1e-4, *RATES)

SIX_METHODS = (GIPO_02, GIPO_05, GIPO, PPO, SAPO, NO_CLIP)

PROXIMAL = tuple(
    Method(
        "proximal_gipo",
        {"sigma_stale": stale, "sigma_prox": prox},
        f"stale {stale:g}, prox {prox:g}",
    )
    for stale in (0.5, 1.0, 2.0, 100.0)
    for prox in (0.5, 1.0)
)
FOLLOWING = tuple(
    Method(
        "following_gipo",
        {"mean_weight": mean, "sigma_prox": 0.5},
        f"mean weight {mean:g}, prox 0.5",
    )
    for mean in (0.7, 0.9, 0.97)
)

ABLATION = {
    "quick": Scale(tasks=(CARTPOLE,), seeds=range(3), steps=0.25),
    "committed": Scale(tasks=(CARTPOLE, CATCH), seeds=range(10)),
    "full": Scale(tasks=(CARTPOLE, ACROBOT, CATCH, PENDULUM), seeds=range(20), steps=8),
}
_TUNED = (CARTPOLE.lasting(49_152), ACROBOT, CATCH.lasting(32_768))
_AGED = (CATCH.lasting(32_768), CARTPOLE.lasting(49_152))
_UNSEEN = (FOUR_ROOMS.lasting(32_768), BREAKOUT, INVADERS)
_DEVELOPED = (CARTPOLE.lasting(32_768), CATCH.lasting(32_768), ACROBOT)
_FAMILY = (CARTPOLE, ACROBOT, CATCH)
_LONG_CARTPOLE = dataclasses.replace(
    CARTPOLE, settings=CARTPOLE.settings | {"max_episode_steps": 2_000}
)
_OPEN = (_LONG_CARTPOLE, ACROBOT, CATCH.lasting(32_768), BREAKOUT.lasting(131_072))

replay_sizes = Study(
    name="replay_sizes",
    question="Does GIPO learn best over replay sizes from on-policy to 128 iterations old?",
    methods=SIX_METHODS,
    program=switch.compared,
    parts=regimes_first,
    folders=("tuning", "replay"),
    curves=engine.CURVES,
    digits=(6, 3),
    presets={
        "quick": Scale(
            tasks=(CARTPOLE, CATCH),
            methods=SIX_METHODS[1:],
            cells=replay(1, 32),
            seeds=range(3),
            rates=(1e-3,),
            tuning_seeds=range(1000, 1001),
            tuning_cells=replay(16),
            steps=0.25,
        ),
        "committed": Scale(
            tasks=SIX,
            cells=replay(1, 16, 128),
            seeds=range(10),
            rates=RATES,
            tuning_seeds=range(1000, 1002),
            tuning_cells=replay(16),
        ),
        "full": Scale(
            tasks=(*SIX, ASTERIX),
            cells=replay(1, 4, 16, 64, 128, 256),
            seeds=range(20),
            rates=MORE_RATES,
            tuning_seeds=range(1000, 1005),
            tuning_cells=replay(16),
            steps=16,
        ),
    },
    scores=scores.replay_sizes,
)

sigma = Study(
    name="sigma",
    question="How does GIPO's return depend on sigma, on fresh and on stale data?",
    methods=(
        *(Method("gipo", {"sigma": sigma}) for sigma in (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)),
        *(Method("gipo", {"sigma": 1.0, "sigma_neg_ratio": ratio}) for ratio in (0.5, 2.0)),
    ),
    parts=in_one,
    by=(),
    presets=ABLATION,
    scores=scores.sigma,
)

_ROWS = (
    Study(
        name="trust_weights",
        question="What weight does a sample keep as its importance ratio leaves 1?",
        measure=weights.measure_paper,
        scores=weights.score_paper,
    ),
    Study(
        name="gridworld",
        question="Which objectives trade bias against variance best where both are known exactly?",
        measure=gridworld.measure,
        scores=gridworld.scores,
    ),
    Study(
        name="bounds",
        question="Does sigma bound every update, and do estimates concentrate as it implies?",
        measure=bounds.measure,
        scores=bounds.scores,
    ),
    Study(
        name="staleness",
        question="What does stale replay cost each objective on CartPole and Acrobot?",
        # SAPO with the defaults of its authors, as these runs had it.
        methods=(GIPO, PPO, Method("sapo"), NO_CLIP),
        parts=in_one,
        by=("regime",),
        batch_mode="auto",
        curves=engine.CURVES,
        curves_by_regime=False,
        presets={
            preset: Scale(
                tasks=(CARTPOLE, ACROBOT), cells=replay(1, 8, 64), seeds=range(seeds), steps=steps
            )
            for preset, seeds, steps in (("quick", 5, 0.5), ("committed", 10, 1), ("full", 20, 8))
        },
        scores=scores.staleness,
    ),
    replay_sizes,
    Study(
        name="tuned_sizes",
        question="Does GIPO learn best where every method is tuned at every replay size?",
        methods=tuple(
            Method(objective, parameters)
            for objective, widths in scores.WIDTHS.items()
            for parameters in widths.values()
        ),
        program=switch.compared,
        parts=balanced,
        folders=("tuned_tune", "tuned_report"),
        choose=scores.chosen_arms,
        extend=scores.with_width,
        columns=(("run", *WIDTH_KEYS, "auc", "final_return"), (*WIDTH_KEYS, "auc")),
        curves=("episode_return",),
        progress=True,
        presets={
            "quick": Scale(
                tasks=(CARTPOLE.lasting(16_384), CATCH.lasting(16_384)),
                cells=replay(1, 32),
                rates=(1e-3, 3e-3),
                tuning_seeds=range(2000, 2001),
                seeds=range(3000, 3002),
            ),
            "committed": Scale(
                tasks=_TUNED,
                cells=replay(1, 16, 128),
                rates=MORE_RATES,
                tuning_seeds=range(2000, 2005),
                seeds=range(3000, 3010),
            ),
            "full": Scale(
                tasks=(*_TUNED, *(t.lasting(262_144) for t in (BREAKOUT, INVADERS, ASTERIX))),
                cells=replay(1, 4, 16, 64, 128, 256),
                rates=MORE_RATES,
                tuning_seeds=range(2000, 2010),
                seeds=range(3000, 3020),
            ),
        },
        scores=scores.tuned_sizes,
    ),
    Study(
        name="age_and_size",
        question="Is it the age of replayed data that costs return, or the size of the buffer?",
        methods=(GIPO_02, GIPO, PPO, SAPO, NO_CLIP),
        program=switch.compared,
        parts=high_reuse,
        folders=("age_tune", "age_report"),
        extend=scores.with_late_means,
        columns=((*KEYS, "final_return", "auc", *scores.LATE), (*KEYS, "auc")),
        progress=True,
        presets={
            "quick": Scale(
                tasks=(CATCH.lasting(16_384),),
                cells=windows((1, 16), (0, 16)),
                rates=(1e-3,),
                seeds=range(3200, 3203),
            ),
            "committed": Scale(
                tasks=_AGED,
                cells=windows((1, 16, 64), (0, 16, 64)),
                rates=RATES,
                tuning_seeds=range(2200, 2203),
                seeds=range(3200, 3210),
            ),
            "full": Scale(
                tasks=(*_AGED, ACROBOT),
                cells=windows((1, 4, 16, 64, 128), (0, 4, 16, 64, 128)),
                rates=MORE_RATES,
                tuning_seeds=range(2200, 2205),
                seeds=range(3200, 3220),
            ),
        },
        scores=scores.age_and_size,
    ),
    Study(
        name="utilization",
        question="Does clipping collapse on old data, where, and does return follow?",
        runs_of=replay_sizes,
        scores=scores.utilization,
    ),
    Study(
        name="sample_efficiency",
        question="Does GIPO need fewer environment steps to reach a given return?",
        runs_of=replay_sizes,
        scores=scores.sample_efficiency,
    ),
    Study(
        name="stability",
        question="Is training with GIPO more stable: less spread, no collapse, no divergence?",
        runs_of=replay_sizes,
        scores=scores.stability,
    ),
    sigma,
    Study(
        name="asymmetry",
        question="Does another width for negative advantages (sigma_neg_ratio) help?",
        runs_of=sigma,
        scores=scores.asymmetry,
    ),
    Study(
        name="kernel",
        question="Does the shape of the trust weight matter: Gaussian, Laplacian or Cauchy?",
        methods=(GIPO_05, GIPO),
        parts=by_setting("kernel", *KERNELS),
        by=("kernel",),
        presets=ABLATION,
        scores=scores.kernel,
    ),
    Study(
        name="token_vs_joint",
        question="With several action tokens, should the ratio be per token or joint?",
        methods=tuple(Method("gipo", {"sigma": sigma}) for sigma in (0.25, 0.5, 1.0, 2.0)),
        parts=by_setting("ratio_level", "token", "joint"),
        by=("ratio_level",),
        presets={
            preset: dataclasses.replace(scale, tasks=(REACHER,))
            for preset, scale in ABLATION.items()
        },
        scores=scores.token_vs_joint,
    ),
    Study(
        name="objective_family",
        question="How does GIPO compare with all other objectives, on fresh and on stale data?",
        methods=(
            Method(
                switch.any_of_them,
                {"which": [float(index) for index in range(len(switch.any_of_them.names))]},
                "all",
            ),
        ),
        parts=by_task,
        by=("env",),
        batch_mode="auto",
        table="objective_family",
        columns=(("env", "objective", "age", "seed", "status", "env_steps", "final_return"), ()),
        digits=(8, 4),
        presets={
            preset: Scale(tasks=_FAMILY, seeds=range(seeds), rates=(1e-3,), steps=steps)
            for preset, seeds, steps in (("quick", 2, 0.125), ("committed", 5, 1), ("full", 20, 16))
        },
        measure=weights.measure_family,
        scores=scores.objective_family,
    ),
    metaworld.STUDY,
    *width.ROWS,
    Study(
        name="width_sizes",
        question="Are PPO-Clip and GIPO apart where both have the best width at every replay size?",
        methods=width.FAMILIES,
        program=switch.compared,
        parts=as_the_authors,
        folders=("width_tune", "width_report"),
        score="eval_return_sampled",
        extend=scores.with_late_means,
        columns=((*KEYS, "auc", "final_return", *scores.LATE), (*KEYS, "auc")),
        progress=True,
        presets={
            "quick": Scale(
                tasks=(CATCH.lasting(8_192),),
                methods=(GIPO, width.CLIPS[0.2], NO_CLIP),
                cells=replay(4, 16),
                rates=(1e-3,),
                seeds=range(7800, 7802),
            ),
            "committed": Scale(
                tasks=_OPEN,
                cells=replay(4, 16, 64, 128),
                rates=(3e-4, 1e-3, 3e-3, 1e-2),
                tuning_seeds=range(7700, 7703),
                seeds=range(7800, 7810),
            ),
            "full": Scale(
                tasks=(*_OPEN, *(t.lasting(262_144) for t in (INVADERS, ASTERIX))),
                cells=replay(4, 16, 64, 128, 256),
                rates=(3e-4, 1e-3, 3e-3, 1e-2),
                tuning_seeds=range(7700, 7705),
                seeds=range(7800, 7820),
            ),
        },
        scores=width.sizes,
    ),
    age.STUDY,
    Study(
        name="proposal_development",
        question="Which widths should proximal GIPO have, and should they follow the data?",
        methods=(*PROXIMAL, *FOLLOWING),
        program=switch.contenders,
        parts=high_reuse,
        folders=("", "develop_tune"),
        by=("env",),
        table="proposal_development",
        columns=((*KEYS, "auc", "final_return"), ()),
        presets={
            "quick": Scale(
                tasks=(CATCH.lasting(16_384),),
                cells=replay(1, 16),
                rates=(1e-3, 3e-3),
                seeds=range(4000, 4002),
            ),
            "committed": Scale(
                tasks=_DEVELOPED, cells=replay(1, 16, 128), rates=RATES, seeds=range(4000, 4006)
            ),
            "full": Scale(
                tasks=(*_DEVELOPED, PENDULUM.lasting(262_144)),
                cells=replay(1, 16, 128),
                rates=MORE_RATES,
                seeds=range(4000, 4016),
            ),
        },
        scores=scores.proposal_development,
    ),
    Study(
        name="proposal",
        question="Is following GIPO no worse than the best method at every staleness?",
        methods=scores.CONTENDERS,
        program=switch.contenders,
        parts=tasks_first,
        folders=("proposal_tune", "proposal_report"),
        columns=((*KEYS, "final_return", "auc"), (*KEYS, "auc")),
        progress=True,
        presets={
            "quick": Scale(
                tasks=(BREAKOUT.lasting(8_192),),
                cells=replay(1, 16),
                rates=(1e-3,),
                seeds=range(3400, 3402),
            ),
            "committed": Scale(
                tasks=_UNSEEN,
                cells=replay(1, 16, 128),
                rates=RATES,
                tuning_seeds=range(2400, 2403),
                seeds=range(3400, 3410),
            ),
            "full": Scale(
                tasks=tuple(task.lasting(262_144) for task in _UNSEEN),
                cells=replay(1, 4, 16, 64, 128, 256),
                rates=MORE_RATES,
                tuning_seeds=range(2400, 2405),
                seeds=range(3400, 3420),
            ),
        },
        scores=scores.proposal,
    ),
    Study(
        name="reuse_bias",
        question="Does damping by GIPO also lower the reuse bias of a policy on a fixed buffer?",
        measure=reuse_bias.measure,
        scores=reuse_bias.scores,
    ),
    Study(
        name="flow",
        question="What do clip, GRPO-Guard and GIPO do to a flow's reward and diversity?",
        measure=flow.measure,
        scores=flow.scores,
    ),
    Study(
        name="flow_proxy",
        question="Does GRPO-Guard hold back over-optimisation of a wrong reward model?",
        measure=flow.measure_proxy,
        scores=flow.proxy_scores,
    ),
    selection.STUDY,
    selection.COSTS_STUDY,
    Study(
        name="sequence_bias",
        question="Which ratio level estimates the gradient of a response best, exactly computed?",
        measure=sequence_bias.measure,
        scores=sequence_bias.scores,
    ),
    sequences.STALENESS,
    sequences.LAG,
    Study(
        name="mismatch",
        question="Which rare tokens do PPO-Clip and DPPO mask where sampler and trainer differ?",
        measure=mismatch.measure,
        scores=mismatch.scores,
    ),
    sequences.LEARNING,
    Study(
        name="evidence",
        question="How far do the verdicts carry: width, ceilings, interaction, rates tried?",
        scores=evidence.tables,
    ),
)

STUDIES = {study.name: study for study in _ROWS}
"""All studies by name, in the order in which they run."""
