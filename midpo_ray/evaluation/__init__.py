"""Evaluation of models: prompts, generation, judges, metrics with intervals, and a report."""
