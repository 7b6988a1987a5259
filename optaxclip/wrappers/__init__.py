"""Transformations around an optimizer or a clipper."""
