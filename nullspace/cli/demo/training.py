"""Training as a user of TRL writes it, without its output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nullspace.progress import Progress


def train(
    peft_model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    *,
    rate: float,
    steps: int,
    batch_size: int,
    folder: Path,
    stage: str,
    progress: Progress,
) -> None:
    """Train what is trainable of an adapter by TRL's `SFTTrainer`, in float32 on the CPU, on the completions alone.

    Args:
        peft_model: the model, changed in place.
        tokenizer: of the model.
        rows: `prompt` and `completion`.
        rate: learning rate at the first step, from which it falls to zero along a cosine.
        steps, batch_size: optimizer steps, and examples in each.
        folder: where the Trainer may write.
        stage, progress: name and receiver of its progress.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(stage, state.global_step, steps, 0)

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    progress(stage, 0, steps, 0)
    dataset = Dataset.from_list(list(rows))
    trainer = SFTTrainer(peft_model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Steps()])
    trainer.remove_callback(PrinterCallback)  # without bars, Trainer prints its summary as a dictionary
    trainer.train()
    peft_model.eval()
