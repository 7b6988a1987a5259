"""The lines of `how_to/where_you_train.md` with the frameworks that the page runs without.

    python docs/_frameworks.py keras rlax tunix kauldron

Run it in an environment of its own, after `pip install keras rlax google-tunix kauldron` or one of
them: what they depend on (TensorFlow, transformers) this repository does without. Each check trains
a few steps with the changed lines, looks at what the clipper knows, and prints the versions. Of
Kauldron pip found no set of versions in a quarter of an hour: `pip install --no-deps kauldron` and
`pip install einops 'etils[edc]' immutabledict ml_collections lark typeguard mediapy tabulate clu
tensorflow` are enough here.
"""

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype(np.float32)
Y = X.sum(1, keepdims=True)


def same(found: float, grads: object) -> None:
    """Raises unless the clipper measured the norm of these gradients."""
    np.testing.assert_allclose(found, optax.tree.norm(grads), rtol=1e-5)


def keras() -> None:
    """A custom training step: Keras' model and Adam, the clipper between them."""
    import keras

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.MeanSquaredError()
    clipper = optaxclip.agc(0.01, unit_axes=optaxclip.haiku_unit_axes)
    paths = [variable.path for variable in model.trainable_variables]

    def named(values):
        return dict(zip(paths, values, strict=True))

    def compute_loss(trainable, non_trainable, x, y):
        out, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return loss_fn(y, out), non_trainable

    @jax.jit
    def train_step(state, x, y):
        trainable, non_trainable, optimizer_variables, clip_state = state
        compute = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, non_trainable), grads = compute(trainable, non_trainable, x, y)
        clipped, clip_state = clipper.update(named(grads), clip_state, named(trainable))
        grads = [clipped[path] for path in paths]
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, grads, trainable
        )
        return loss, (trainable, non_trainable, optimizer_variables, clip_state)

    trainable, others, slots = (
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    )
    state = (trainable, others, slots, clipper.init(named(trainable)))
    losses = []
    for _ in range(50):
        loss, state = train_step(state, X, Y)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert optaxclip.clip_stats(state[3])["agc"].clipped_count > 0


def rlax() -> None:
    """The clipped surrogate of PPO, with `max_grad_norm`."""
    import rlax

    advantages, actions = RNG.normal(size=32).astype(np.float32), RNG.integers(0, 3, 32)
    params = jnp.zeros((4, 3))
    tx = optax.chain(optaxclip.clip_by_global_norm(0.1), optax.adam(3e-2, eps=1e-5))

    def loss_fn(params, old):
        log_probs = jax.nn.log_softmax(X @ params)[jnp.arange(32), actions]
        return rlax.clipped_surrogate_pg_loss(jnp.exp(log_probs - old), advantages, 0.2)

    state, old = tx.init(params), jnp.full(32, -np.log(3.0), jnp.float32)
    for _ in range(16):
        grads = jax.grad(loss_fn)(params, old)
        updates, state = tx.update(grads, state, params)
        same(optaxclip.clip_stats(state)["clip_by_global_norm"].pre_clip_norm, grads)
        params = optax.apply_updates(params, updates)


def tunix() -> None:
    """`PeftTrainer` on a model with LoRA: its own step, and what the clipper saw of it."""
    from flax import nnx
    from tunix.sft import metrics_logger, peft_trainer

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.out = nnx.LoRALinear(8, 16, lora_rank=2, rngs=rngs)

        def __call__(self, tokens):
            return self.out(self.embed(tokens))

    def loss_fn(model, input_tokens, input_mask):
        logits = model(input_tokens[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, input_tokens[:, 1:])
        return jnp.mean(each * input_mask[:, 1:])

    model = Model(nnx.Rngs(0))
    base = np.asarray(model.out.kernel[...])
    rate = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
    optimizer = optax.chain(optaxclip.clip_by_global_norm(0.01), rate)
    with tempfile.TemporaryDirectory() as logs:
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=1000,
            max_steps=5,
            metrics_logging_options=metrics_logger.MetricsLoggerOptions(log_dir=logs),
        )
        trainer = peft_trainer.PeftTrainer(model, optimizer, config).with_loss_fn(loss_fn)
        trainer = trainer.with_gen_model_input_fn(
            lambda batch: {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
        )
        tokens = RNG.integers(0, 16, (4, 8))
        batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones((4, 8)))
        trainer.train([batch] * 5, None)
    stats = optaxclip.clip_stats(trainer.optimizer.opt_state)["clip_by_global_norm"]
    assert int(stats.count) == 5
    assert int(stats.clipped_count) == 5
    np.testing.assert_array_equal(model.out.kernel[...], base)
    shapes = [x.shape for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    print(
        f"  LoRA {shapes}; the trainer finds the learning rate:", trainer._try_get_learning_rate()
    )


def kauldron() -> None:
    """`kd.optim.named_chain` in a config, resolved."""
    from kauldron import konfig

    with konfig.imports():
        import optax as lazy_optax
        from kauldron import kd

        import optaxclip as lazy_optaxclip

    cfg = konfig.ConfigDict()
    cfg.optimizer = kd.optim.named_chain(
        clip=lazy_optaxclip.clip_by_global_norm(max_norm=1.0),
        adam=lazy_optax.scale_by_adam(b1=0.95),
        lr=lazy_optax.scale_by_learning_rate(0.003),
    )
    cfg.optimizer.clip.max_norm = 0.5
    tx = konfig.resolve(cfg.optimizer)
    params = {"w": jnp.ones(4)}
    grads = {"w": jnp.full(4, 2.0)}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    stats = optaxclip.clip_stats(state)["clip_by_global_norm"]
    same(stats.pre_clip_norm, grads)
    assert float(stats.threshold) == 0.5
    print("  the state is a dict of", sorted(state))


CHECKS: dict[str, tuple[str, Callable[[], None]]] = {
    "keras": ("keras", keras),
    "rlax": ("rlax", rlax),
    "tunix": ("google-tunix", tunix),
    "kauldron": ("kauldron", kauldron),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        package, check = CHECKS[name]
        check()
        versions = {p: importlib.metadata.version(p) for p in (package, "jax", "optax")}
        print(f"{name}: the lines of the page run with {versions}")
