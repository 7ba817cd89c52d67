"""What tests of the training script compare: batches in float64, and gradients."""

from peft_talora.data import collate


def double_batch(rows):
    """A batch of a dataset's items, for a model in float64."""
    batch = collate(rows)
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def gradients(model):
    """{parameter: a copy of its gradient}."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
