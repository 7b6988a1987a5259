"""From one call of a loss to weighted sums of gradients: by which way, and what it costs."""
