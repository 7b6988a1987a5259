"""Losses with clipping built in."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp


def phuber_cross_entropy(logits: jax.Array, labels: jax.Array, tau: Any = 2.0) -> jax.Array:
    """Partially Huberised cross-entropy: robust to wrong labels.

    With p the probability of the label: `-log p` if `p > 1 / tau`, else `-tau p + log tau + 1`. An
    example that the model is sure is mislabelled stops pulling: the slope in p is at most tau.

    Args:
      logits: [..., K], floating point.
      labels: [...], integers in [0, K).
      tau: > 1; a number or a traced scalar. Infinity gives cross-entropy. 2 withstands much
        noise; with many classes, where p is small at first, take more (10 is common).

    Returns:
      The losses, [...].

    Raises:
      ValueError: shapes that do not fit; tau <= 1.
      TypeError: labels that are not integers.

    Guarantees:
      The loss and its derivative by p are continuous at p = 1 / tau; the loss is at most
      `log tau + 1`. The derivative is finite for all finite logits.

    Edge cases:
      A label >= K makes the loss of its example NaN; one below 0 counts from the end. Mask these.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> print(optaxclip.phuber_cross_entropy(logits, jnp.array([0, 1])).round(3))
      [0.127 1.455]

    Source: Menon, Rawat, Reddi & Kumar, ICLR 2020 ("Can gradient clipping mitigate
    label noise?").
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}. Pass class indices.")
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits must be [..., K] for labels [...], got shapes {logits.shape} and"
            f" {labels.shape}. Put the classes on the last axis."
        )
    if isinstance(tau, numbers.Real) and not float(tau) > 1:
        raise ValueError(f"tau must be > 1, got {tau}. Pass for example 2.0.")
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    tau = jnp.asarray(tau, log_p.dtype)
    infinite = jnp.isinf(tau)
    tau = jnp.where(infinite, 2.0, tau)  # the slope of the branch not taken must be finite too
    log_tau = jnp.log(tau)
    huberised = 1 + log_tau - tau * jnp.exp(log_p)
    return jnp.where(infinite | (log_p > -log_tau), -log_p, huberised)
