"""The adapter that a client has trained on at home: a PEFT folder that is not to be published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.state import PrivateStore
from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.adapters.peft_reading import names_for_peft
from fedllm.errors import CheckpointError
from fedllm.files import make_private_folder
from fedllm.messages import ClientAtHome
from fedllm.models.files import ModelFiles

HOME = "home"


def home_folder(store: PrivateStore, client_id: str) -> Path:
    """Return where a client keeps the adapter of a run that it trained on at home."""
    return store.folder / client_id / HOME


def modules_of(model: Any, layout: AdapterLayout) -> list[str]:
    """Return the names under which PEFT finds the layers of a layout."""
    modules = [matrix.module for matrix in layout.matrices]
    return names_for_peft(model, modules) or modules


def save_home(
    folder: Path, state: AdapterState, answer: ClientAtHome, files: ModelFiles, modules: Sequence[str]
) -> None:
    """Write a client's adapter as a PEFT folder that only this user can open.

    Raises:
        CheckpointError: it could not be written; an earlier one stays.
    """
    try:
        make_private_folder(folder.parent)
        save_adapter(
            folder,
            state,
            base_model=files.public_name,
            revision=files.revision,
            target_modules=modules,
            card=home_card(answer),
            is_public=False,
        )
    except OSError as error:
        raise CheckpointError(
            f"client {answer.client_id}: its adapter cannot be written in {folder} ({error.strerror}); free"
            " space there, or name another folder"
        ) from None


def home_card(answer: ClientAtHome) -> str:
    """Return the README.md of an adapter that a client trained on at home."""
    return f"""# {answer.client_id}: a private adapter

The adapter of a federation, trained on for {answer.steps} steps with the rows of {answer.client_id} alone.
It was trained on private text without any noise: **do not publish it**.

| held-out loss (nats per token, on rows that chose nothing) | |
|---|---|
| trained alone, without the federation | {answer.alone:.4f} |
| the federation's adapter as it is | {answer.shared:.4f} |
| this adapter | {answer.home:.4f} |
"""
