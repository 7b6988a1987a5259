"""From per-example gradients to one update, inside `optax.chain`."""
