"""What to change in a recipe whose training steps do not fit into memory."""

from __future__ import annotations

from transformers import TrainingArguments

from molora.train.output import last_checkpoint
from molora.train.recipe import Recipe


def smaller_steps(recipe: Recipe, args: TrainingArguments) -> str:
    """What makes a step smaller, of what is not done already, and where the run would go on."""
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    changes = []
    if size > 1:
        changes.append(
            f"lower training.per_device_train_batch_size ({size}) and raise training.gradient_accumulation_steps "
            f"({accumulation}) as much"
        )
    # transformers is renaming it.
    checkpointing = (
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    )
    if not getattr(args, checkpointing):
        changes.append(f"set training.{checkpointing}: true")
    changes.append("lower sequence.max_length")
    if recipe.base.quantization is None:
        changes.append("set base.quantization: nf4")
    last = last_checkpoint(recipe.output_dir)
    kept = f"{last} is whole, but --resume takes the recipe as it was" if last else "no checkpoint was written"
    return f"{', or '.join(changes)}, and start anew in another training.output_dir ({kept})"
