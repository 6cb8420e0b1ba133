"""Sweeps on Ray Tune: responses are scored once, then every trial only trains."""
