"""Gradients as data: forms, which axes they stand for, contractions, norms, sums over trees."""
