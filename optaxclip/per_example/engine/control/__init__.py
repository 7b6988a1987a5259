"""Loops, branches and checkpoints in which a parameter meets the example."""
