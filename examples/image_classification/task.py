"""Image classification as a task for `examples.training`."""

import functools

import jax
import jax.numpy as jnp
import optax

from examples.image_classification import pretrained
from examples.training.losses import cross_entropy
from examples.training.task import Task


def make(name, model, loader, l2=0.0, weights=""):
    """The task of training `model` on the batches of `loader`.

    Args:
      name: the name of the task, for messages.
      model: a module that is called as `model(images, train)`.
      loader: the batches.
      l2: this number times half the squared norm of the parameters is added to the loss. The
        gradient then contains weight decay, and the layers' statistics do not change.
      weights: a file with initial weights, or "".
    """
    channels = loader.data.train[0]["image"].shape[-1]
    images = jnp.zeros((1, loader.side, loader.side, channels))
    fresh = functools.partial(model.init, x=images, train=False)
    stored = pretrained.load(weights, jax.eval_shape(fresh, jax.random.key(0))) if weights else {}

    def init(key):
        variables = pretrained.put(stored, fresh(key))
        return variables.pop("params"), variables

    def loss(params, model_state, batch, key):
        logits, model_state = model.apply(
            {"params": params} | model_state,
            batch["image"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        error = cross_entropy(logits, batch["label"])
        penalty = l2 / 2 * optax.tree.norm(params, squared=True) if l2 else 0.0
        metrics = {"cross_entropy": error, "accuracy": hits(logits, batch).mean()}
        return error + penalty, (model_state, metrics)

    def evaluate(params, model_state, batch):
        logits = model.apply({"params": params} | model_state, batch["image"], train=False)
        count = len(batch["label"])
        total = count * cross_entropy(logits, batch["label"])
        return {
            "loss": total,
            "accuracy": hits(logits, batch).sum(),
            "count": jnp.asarray(count),
        }

    return Task(
        name=name,
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_batches=loader.train_batches,
        eval_batches=loader.eval_batches,
        steps_per_epoch=loader.steps_per_epoch,
    )


def hits(logits, batch):
    return logits.argmax(-1) == batch["label"]
