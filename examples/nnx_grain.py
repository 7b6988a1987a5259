"""Clipping with Flax NNX, fed by Grain: the batch that a guard left out is found again.

    python examples/nnx_grain.py

An MLP learns scikit-learn's handwritten digits, one image of which has a pixel that is NaN. The
guard leaves out each step that meets it, and its state knows the first of them. A
`grain.MapDataset` gives the batch of any step by its number, shuffled and repeated as it is, so
that the image is found without training again. Takes a few seconds.
"""

import grain
import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip

STEPS, BATCH_SIZE, PRINT_EVERY, BROKEN = 200, 64, 40, 1000


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, [B, 10]."""
        return self.out(nnx.relu(self.hidden(x)))


def loss_fn(model: MLP, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy."""
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> jax.Array:
    """One step: gradient, and what the optimizer makes of it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


def batches(images: np.ndarray, labels: np.ndarray) -> grain.MapDataset:
    """Batches by the number of the step; each record carries its own number."""
    pairs = enumerate(zip(images, labels, strict=True))
    records = [{"image": image, "label": label, "record": i} for i, (image, label) in pairs]
    return grain.MapDataset.source(records).seed(0).shuffle().repeat().batch(BATCH_SIZE)


def main() -> None:
    """Trains, prints how it goes, and finds the image that stopped some of the steps."""
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.data / 16).astype(np.float32), data.target, random_state=0
    )
    x[BROKEN, 20] = np.nan
    dataset = batches(x, y)

    model = MLP(nnx.Rngs(0))
    # The guard goes outermost: a NaN gradient then changes neither clipper nor Adam.
    tx = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_global_norm(0.5), optax.adam(3e-3)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    for step in range(STEPS):
        loss = train_step(model, optimizer, dataset[step])
        if (step + 1) % PRINT_EVERY == 0:
            known = optaxclip.clip_scalars(optimizer.opt_state)
            print(
                f"step {step + 1}: loss {loss:.3f},"
                f" {known['clip_by_global_norm/clipped_count']:.0f} steps clipped,"
                f" {known['skip_nonfinite/skipped_count']:.0f} left out"
            )

    predictions = model(x_test).argmax(axis=-1)
    print(f"test accuracy {np.mean(predictions == y_test):.1%}")

    known = optaxclip.clip_scalars(optimizer.opt_state)
    first = min(n for name, n in known.items() if "/first_nonfinite/" in name)
    batch = dataset[first]
    for k in np.flatnonzero(np.isnan(batch["image"]).any(axis=1)):
        print(f"first left out: step {first}, for record {batch['record'][k]} of the data")


if __name__ == "__main__":
    main()
