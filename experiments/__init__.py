"""What is studied: a table of studies, and what runs, scores, draws and judges any of them.

``studies`` is the table, ``engine`` trains, ``scores`` computes numbers from stored tables,
``figures`` draws them, ``claims`` judges the paper's claims by them, and ``report`` fills the
tables of RESULTS.md. ``exact`` holds what is computed and not trained; ``metaworld``,
``sequences``, ``selection`` and ``flow`` are studies that are no grid of tasks and methods.
Mechanics live in ``gipo_jax``.
"""
