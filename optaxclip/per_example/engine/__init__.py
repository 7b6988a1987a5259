"""The loss as a program: build it, walk it forward, pull gradients back to the parameters."""
