"""Objectives of this package inside trainers of language models; each needs its own extra."""
