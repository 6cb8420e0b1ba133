"""Is it safer and more helpful? Prompt sets, generation, judges, figures with intervals, and a report."""
