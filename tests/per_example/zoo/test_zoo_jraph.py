"""Jraph: graph networks; an example is a padded graph."""

import jax.numpy as jnp
import jraph
import numpy as np
from tools.agreement import normal
from tools.zoo_check import check

NODES, EDGES = 5, 7


def graphs():
    ends = np.random.default_rng(0).integers(0, NODES, (2, 3, EDGES))
    return {
        "nodes": normal(0, 3, NODES, 2),
        "edges": normal(1, 3, EDGES, 2),
        "senders": jnp.asarray(ends[0]),
        "receivers": jnp.asarray(ends[1]),
    }


def graph(example):
    return jraph.GraphsTuple(
        **example, globals=jnp.ones((1, 2)), n_node=jnp.array([NODES]), n_edge=jnp.array([EDGES])
    )


def layer(seed, inputs, outputs):
    return {"w": normal(seed, inputs, outputs) / 2, "b": normal(seed + 10, outputs)}


def apply(layer, x):
    return jnp.tanh(x @ layer["w"] + layer["b"])


def test_graph_network():
    params = {"edge": layer(2, 8, 3), "node": layer(3, 10, 4), "globals": layer(4, 9, 2)}

    def loss(params, example):
        @jraph.concatenated_args
        def edge(x):
            return apply(params["edge"], x)

        @jraph.concatenated_args
        def node(x):
            return apply(params["node"], x)

        @jraph.concatenated_args
        def whole(x):
            return apply(params["globals"], x)

        return jnp.sum(jraph.GraphNetwork(edge, node, whole)(graph(example)).globals)

    check(loss, params, graphs())


def test_graph_convolution():
    params = {"one": layer(2, 2, 4), "two": layer(3, 4, 3)}

    def loss(params, example):
        for each in params.values():
            update = lambda x, each=each: apply(each, x)
            convolution = jraph.GraphConvolution(update, add_self_edges=True)
            example = {**example, "nodes": convolution(graph(example)).nodes}
        return jnp.sum(example["nodes"] ** 2)

    check(loss, params, graphs(), clipped=True)


def test_graph_attention():
    params = {"query": layer(2, 2, 4), "logit": layer(3, 10, 1)}

    def loss(params, example):
        def logit(sent, received, edges):
            return apply(params["logit"], jnp.concatenate([sent, received, edges], axis=1))

        attention = jraph.GAT(lambda nodes: apply(params["query"], nodes), logit)
        return jnp.sum(attention(graph(example)).nodes ** 2)

    check(loss, params, graphs())
