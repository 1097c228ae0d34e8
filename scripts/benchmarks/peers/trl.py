"""What a user of TRL does: its SFTTrainer with a LoRA configuration and the settings it comes with.

Left as they come: gradient checkpointing (on), padded batches without packing, the fused AdamW, the head that
forms its logits in chunks, and entropy and token accuracy of every step. Set, so that results are equal or
can be read off: float32 (TRL's default of bfloat16 autocast gives other results, and is slower on a CPU
without such units), the rows in order, a constant learning rate, and nothing logged or saved.

The rows come as tokens and label masks, which SFTTrainer takes as they are. From text it would not learn the
same tokens: `assistant_only_loss` refuses the chat template of SmolLM2, which has no generation markers, and
`completion_only_loss` also learns the line break after the end token. Packing puts other rows into a step, so
it cannot give an equal result and is not compared; padding-free batches hold the same rows.
"""

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from fedllm.models.files import quiet_transformers
from scripts.benchmarks.peers import shared
from scripts.benchmarks.peers.shared import Outcome
from scripts.benchmarks.timing import CPU, Phases
from scripts.benchmarks.workloads import Workload


def train_with_trl(
    folder: Path,
    workload: Workload,
    scratch: Path,
    *,
    at_best: bool = False,
    model: Any = None,
    device: torch.device = CPU,
) -> Outcome:
    """Train on the base model in `folder`, or on `model` where it is resident, which is left as it was.

    Args:
        folder: the base model and its tokenizer.
        workload: the rows, the adapter before them and the numbers.
        scratch: a folder for what the trainer may write.
        at_best: without padding and without gradient checkpointing, the fastest of TRL's settings that keeps
            the result. TRL recommends padding-free batches for FlashAttention only; on a CPU transformers
            keeps the rows apart by a mask.
        model: the resident base model, so that nothing is loaded.
        device: where it trains.
    """
    phase, job, layout = Phases(), workload.job, workload.layout
    settings: dict[str, Any] = {"max_length": workload.max_length}
    if at_best:  # padding-free batches take rows that are cut already
        settings = {"max_length": None, "padding_free": True, "gradient_checkpointing": False}
    is_resident = model is not None
    if not is_resident:
        with phase("load"), quiet_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with phase("tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = shared.tokenized(workload, tokenizer)
    with phase("trainer"):
        data = datasets.Dataset.from_list(
            [{"input_ids": list(row.tokens), "labels": list(row.labels)} for row in rows]
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**shared.trainer_numbers(job.training, scratch, device), **settings),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=shared.peft_config(layout),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        shared.set_adapter(trainer.model, layout, job.start)
    with phase("train"):
        trainer.train()
    with phase("extract"):
        after = shared.read_adapter(trainer.model, layout)
        if is_resident:
            trainer.model.unload()
    return Outcome(after - job.start, phase.cpu)
