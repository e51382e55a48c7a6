"""Language modelling as a task for `examples.training`."""

from typing import Any

import jax.numpy as jnp

from examples.language_model.data import Batches
from examples.training.losses import cross_entropy
from examples.training.task import Task


def make(name: str, model: Any, batches: Batches) -> Task:
    """The task of predicting the next token.

    Args:
      name: the name of the task, for messages.
      model: a module that is called as `model(tokens, train)` and has only parameters.
      batches: the batches of text.
    """

    def init(key):
        tokens, _ = next(batches.evaluation())
        return model.init(key, tokens[:1], train=False)["params"], {}

    def loss(params, model_state, batch, key):
        tokens, following = batch
        logits = model.apply({"params": params}, tokens, train=True, rngs={"dropout": key})
        return cross_entropy(logits, following), (model_state, {})

    def evaluate(params, model_state, batch):
        tokens, following = batch
        logits = model.apply({"params": params}, tokens, train=False)
        count = jnp.asarray(following.size)
        return {"loss": count * cross_entropy(logits, following), "count": count}

    return Task(
        name=name,
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_batches=batches.train,
        eval_batches=batches.evaluation,
        steps_per_epoch=batches.steps_per_epoch,
    )
