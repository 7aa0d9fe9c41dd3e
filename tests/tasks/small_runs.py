"""A small model of a recipe without the engine: opened, trained by a few steps, measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from deqfusion.engine.config import fault


def opened(recipe, folder, config):
    """Splits and a prepared model with its configuration, as the engine would have them."""
    splits, facts = recipe.load(folder, config)
    assert fault(recipe, {**config, **facts}) is None
    # What is stored must be enough to build the model from, and compare equal to what was.
    stored = json.loads(json.dumps({**config, **facts}))
    assert stored == {**config, **facts}
    torch.manual_seed(0)
    model = recipe.build(stored)
    recipe.prepare(model, splits, stored)
    return SimpleNamespace(recipe=recipe, config=stored, splits=splits, model=model)


def everything(samples):
    """All samples as one batch."""
    return samples.batch(torch.arange(len(samples)))


def trained(run, optimizer, steps):
    """Losses of steps on all training samples at once."""
    step = optimizer(run.model.parameters(), lr=2e-2)
    batch, losses = everything(run.splits.train), []
    for _ in range(steps):
        objective = run.recipe.objective(run.model.train(), batch)
        step.zero_grad()
        objective.loss.backward()
        step.step()
        losses.append(objective.loss.item())
    return losses


@torch.no_grad()
def measured(run, samples):
    """Metrics of samples that come in two batches."""
    run.model.eval()
    halves = torch.arange(len(samples)).chunk(2)
    predicted = [run.recipe.predict(run.model, samples.batch(rows)) for rows in halves]
    return run.recipe.metrics(predicted)
