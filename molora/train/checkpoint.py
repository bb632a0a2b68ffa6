"""The Trainer with checkpoints that are whole or absent, an order of rows that resumes exactly, losses by task."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from molora.eval.disk import writing
from molora.integrations.accelerate import use_fsdp_without_gpu
from molora.integrations.deepspeed import fit_stage3, frozen_experts, load_gathered, save_gathered
from molora.train.durable import keep_newest, last_whole_checkpoint, publish, sync, sync_directory, write_checksums
from molora.train.engine import deepspeed_config
from molora.train.optimizer import loraplus_optimizer
from molora.train.sampling import LengthGroupedSampler, row_lengths
from molora.train.task_loss import TaskLosses

PARTIAL = ".partial"
"""Directory inside output_dir for what is being written; the search for ``checkpoint-*`` does not look into it."""


def ranks_of(checkpoint: str) -> int:
    """Processes that wrote a checkpoint: each leaves its random numbers."""
    return len(list(Path(checkpoint).glob("rng_state_*.pth"))) or 1


class LogAtSaves(TrainerCallback):
    """A line of the log at every save and at the last step, so that none averages over what is before a checkpoint:
    a resumed run then logs what the whole run logs."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


class AtomicTrainer(Trainer):
    """The Trainer, except for how a checkpoint appears and for ``train_sampling_strategy: group_by_length``.

    A checkpoint appears under its name only when it is complete and on the disk: the parent writes into
    ``output_dir/.partial``, the finished directory gets its checksums and is renamed, which is atomic on one file
    system, and only then old checkpoints are deleted. A process that is killed while it saves, or a machine that loses
    its power, leaves the previous checkpoint.
    """

    _partial: Path | None = None
    when_prepared: Callable[[], None] = staticmethod(lambda: None)
    """Called when the engine holds the model, before the first step."""
    optimizer: Any
    is_fsdp_enabled: bool
    task_losses: TaskLosses | None = None
    """Where set, batches hold ``task`` (B,), and the log the loss of each task."""
    loraplus_lr_ratio: float | None = None
    """Where set, B learns at this many times the learning rate."""

    def create_optimizer(self, model: Any = None) -> Any:
        made: Any = self.optimizer
        if made is None and self.loraplus_lr_ratio is not None:
            model = self.model if model is None else model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            made = loraplus_optimizer(model, cls, options, self.loraplus_lr_ratio, self.args.weight_decay)
            self.optimizer = made
        return super().create_optimizer(model) if made is None else made

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            use_fsdp_without_gpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @property
    def _has_zero(self) -> bool:
        """Whether DeepSpeed spreads the optimizer over processes; at stage 0 it does not."""
        zero = deepspeed_config(self.args).get("zero_optimization", {})
        return bool(self.is_deepspeed_enabled and zero.get("stage", 0))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        checkpoint = resume_from_checkpoint
        fit_stage3(deepspeed_config(self.args), self.model)
        if checkpoint is None or not self._has_zero or ranks_of(checkpoint) == self.args.world_size:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            load_gathered(self.deepspeed, Path(checkpoint))
            self._load_optimizer_and_scheduler(checkpoint)
        self.when_prepared()
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if frozen := frozen_experts(self.model):
            state_dict = frozen | (state_dict or {})
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._has_zero:
            save_gathered(self.deepspeed, Path(output_dir))

    def prepare_finished(self, state: TrainerState, checkpoint: str | None) -> None:
        """Hands the model to the engine and loads its last checkpoint, without a step."""
        self._prepare_for_training(state.max_steps, None, checkpoint)
        self.state = state

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tasks = inputs.pop("task", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if tasks is not None and self.task_losses is not None and model.training:
            self.task_losses.add(outputs.logits, inputs["labels"], tasks)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs and self.task_losses is not None:
            logs = logs | self.task_losses.collect()
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(row_lengths(rows), self.args.train_batch_size * self.args.world_size, seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        self._partial = run_dir / PARTIAL
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(self._partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._room_for(f"{run_dir / name}"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_checksums(self._partial / name)
                    publish(self._partial / name, run_dir / name)
        finally:
            partial, self._partial = self._partial, None
        if self.args.should_save:
            keep_newest(run_dir, self.args.save_total_limit, self.state.global_step, partial)
            shutil.rmtree(partial)

    @contextmanager
    def _room_for(self, what: str) -> Iterator[None]:
        """A full disk ends in one sentence, and what was half written is removed."""
        run_dir = Path(self.args.output_dir)
        last, _ = last_whole_checkpoint(run_dir)
        whole = f"{last} is whole" if last else "there is no earlier checkpoint"
        try:
            with writing(what, f"{whole}; make room and continue with --resume"):
                yield
        except OSError:
            shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
            raise

    def save_final(self) -> None:
        """Saves the model into ``output_dir``, file by file through ``.partial``."""
        run_dir = Path(self.args.output_dir)
        partial = run_dir / PARTIAL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._room_for(f"the adapter in {run_dir}"):
            self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with self._room_for(f"the adapter in {run_dir}"):
                sync(partial)
            for written in partial.iterdir():
                written.replace(run_dir / written.name)
            partial.rmdir()
            sync_directory(run_dir)
