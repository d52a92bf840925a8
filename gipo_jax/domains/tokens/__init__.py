"""Answers of many tokens: tasks, a small transformer, and the algorithm that trains it."""
