"""The Flower ServerApp: read the run's configuration, start the strategy."""

import logging

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import FedLLMError
from fedllm.runs.records import RoundRecord
from strategies.distillation.report import table_cell
from strategies.flower_strategy import FederatedLora
from strategies.session import Watch

app = ServerApp()
_logger = logging.getLogger("flwr")  # what `flwr log` and `flwr run --stream` show


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; a failure is one line in the log and in the run folder's `result.json`."""
    flat: dict[str, Scalar] = dict(context.run_config)  # `[tool.flwr.app.config]` with its overrides
    try:
        config = RunConfig.from_flat(flat)
        # in process, loading the model does this; a server loads none
        if isinstance(config.model.num_threads, int):
            torch.set_num_threads(config.model.num_threads)
        FederatedLora(config, Watch(notice=_logger.info, record=_log_record)).start(grid, ArrayRecord())
    except FedLLMError as error:
        _logger.error("%s", error)
        raise SystemExit(1) from None  # so that Flower ends the run as failed


def _log_record(record: RoundRecord) -> None:
    loss = "-" if record.training.loss is None else f"{record.training.loss:.4f}"
    held_out = "" if record.mean_held_out is None else f" · held-out {record.mean_held_out:.4f}"
    distilled = f" · distilled {table_cell(record.distillation)}" if record.distillation else ""
    _logger.info(
        "round %d · loss %s%s%s · %d/%d clients · %.2f MB up · %.1f s",
        record.round_num,
        loss,
        held_out,
        distilled,
        len(record.accepted),
        len(record.asked),
        record.bytes_up / 1e6,
        record.seconds,
    )
