"""What is measured: norms, which leaf belongs to which, and what is told about them."""
