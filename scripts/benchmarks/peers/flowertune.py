"""What FlowerTune's ClientApp (adap/flower, examples/flowertune-llm) does for every message.

On current libraries. It loads the base model, wraps it with PEFT, loads the tokenizer and builds a trainer,
and it trains with gradient checkpointing on padded batches, with the logits of every token. Left easy for it:
it tokenises only the rows it trains on (FlowerTune: its whole partition), reads the base model from a warm
page cache without quantising it, and its trainer logs and saves nothing. Dropout is 0, so that results can be
compared; FlowerTune trains with 0.075.
"""

from pathlib import Path

import peft
import torch
import transformers

from fedllm.models.files import quiet_transformers
from scripts.benchmarks.peers import shared
from scripts.benchmarks.peers.shared import Outcome
from scripts.benchmarks.timing import CPU, Phases
from scripts.benchmarks.workloads import Workload


def train_afresh(
    folder: Path,
    workload: Workload,
    scratch: Path,
    *,
    checkpointing: bool = True,
    device: torch.device = CPU,
) -> Outcome:
    """Train on the base model in `folder`; nothing is kept from the last message."""
    phase, job, layout = Phases(), workload.job, workload.layout
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with phase("load"), quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with phase("wrap"):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        model = peft.get_peft_model(model, shared.peft_config(layout))
        shared.set_adapter(model, layout, job.start)
    with phase("tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = shared.tokenized(workload, tokenizer)
    with phase("trainer"):
        arguments = transformers.TrainingArguments(
            **shared.trainer_numbers(job.training, scratch, device),
            gradient_checkpointing=checkpointing,
            remove_unused_columns=False,
        )
        data = [{"input_ids": list(row.tokens), "labels": list(row.labels)} for row in rows]
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest")
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collator
        )
        trainer.remove_callback(transformers.PrinterCallback)
    with phase("train"):
        trainer.train()
    with phase("extract"):
        after = shared.read_adapter(model, layout)
    return Outcome(after - job.start, phase.cpu)
