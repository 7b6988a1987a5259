"""NumPyro: the density of a model, and the evidence bound of an amortized guide."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from tools.agreement import normal
from tools.zoo_check import check, key


def test_time_series():
    """An autoregressive one, by the package's own scan."""

    def model(params, ys):
        def step(before, y):
            mean = before @ params["w"] + params["b"]
            y = numpyro.sample("y", dist.Normal(mean, jnp.exp(params["scale"])).to_event(1), obs=y)
            return y, None

        scan(step, jnp.zeros(2), ys)

    params = {"w": normal(1, 2, 2) / 4, "b": normal(2, 2), "scale": normal(3, 2)}
    check(lambda p, ys: -log_density(model, (p, ys), {}, {})[0], params, normal(0, 3, 5, 2))


def test_logistic_regression():
    """The joint density of weights and one observation."""

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, jnp.ones(3)).to_event(1))
        b = numpyro.sample("b", dist.StudentT(4.0, 0.0, 1.0))
        numpyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    loss = lambda p, xy: -log_density(model, xy, {}, p)[0]
    params = {"w": normal(1, 3), "b": normal(2)}
    check(loss, params, (normal(0, 4, 3), jnp.array([0, 1, 1, 0])), clipped=True)


def test_amortized_inference():
    """As in the package's VAE: parameters by name, noise by a key of each example."""

    def decoder(p, z):
        return jnp.tanh(z @ p["w"]) @ p["out"] + p["b"]

    def model(params, x):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(decoder(params["decoder"], z), 0.5).to_event(1), obs=x)

    def guide(params, x):
        p = params["encoder"]
        h = jnp.tanh(x @ p["w"] + p["b"])
        posterior = dist.Normal(h @ p["mean"], jnp.exp(h @ p["scale"]))
        numpyro.sample("z", posterior.to_event(1))

    def loss(params, example):
        x, seed = example
        own = jax.random.fold_in(key(0), seed)
        return Trace_ELBO(num_particles=2).loss(own, {}, model, guide, params, x)

    encoder = {
        "w": normal(1, 4, 3),
        "b": normal(2, 3),
        "mean": normal(3, 3, 2),
        "scale": normal(4, 3, 2) / 4,
    }
    decoder_params = {"w": normal(5, 2, 3), "out": normal(6, 3, 4), "b": normal(7, 4)}
    params = {"encoder": encoder, "decoder": decoder_params}
    check(loss, params, (normal(0, 3, 4), jnp.arange(3)))


def test_mixture():
    def loss(params, x):
        weights = dist.Categorical(logits=params["weights"])
        factors = jnp.tril(params["factors"], -1) + jnp.eye(2)
        parts = dist.MultivariateNormal(params["means"], scale_tril=factors)
        return -dist.MixtureSameFamily(weights, parts).log_prob(x)

    params = {"weights": normal(1, 3), "means": normal(2, 3, 2), "factors": normal(3, 3, 2, 2)}
    check(loss, params, normal(0, 4, 2), {"factors": "no exact factored form for triangular_solve"})
