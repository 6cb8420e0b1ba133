"""Studies: many contenders on one table of frozen signals, over seeds, in one report."""
