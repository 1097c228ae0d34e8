"""`fedllm registry export`: the versions of a registry in MLflow's model registry, with lineage and aliases.

Each version becomes a run of MLflow that holds the adapter's folder, signature included, and a model version
with its lineage as tags, so that MLflow's own client finds, downloads and compares versions, and `fedllm
verify` accepts what it downloads. What the server keeps of its clients is not exported.
"""

import json
import os
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, FedLLMError, MissingExtraError
from fedllm.models.files import first_line
from fedllm.registry.registry import Registry, Version
from scripts.commands.registry_command import open_registry

# MLflow counts versions itself, so our number is a tag. The digest says which they are: another registry of
# this name may have been exported there too.
NUMBER, DIGEST, MARK = "fedllm.version", "fedllm.digest", "fedllm.marked"
LONGEST_TAG = 100_000  # letters of a model version's tag, by MLflow's own rule


def export(folder: Path, to: str, uri: str, *, as_json: bool) -> None:
    """Copy what another registry does not have yet.

    Raises:
        ConfigError: it is none that is known.
        MissingExtraError: its package is not installed.
        IntegrityError: a version is not as it was written; nothing is sent then.
        FedLLMError: it cannot be reached, or refuses.
    """
    if to != "mlflow":
        raise ConfigError(f"--to {to}: there is mlflow")
    registry = open_registry(folder)
    registry.verify()
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise MissingExtraError(
            "registry export --to mlflow needs a package: pip install 'fedllm[mlflow]'"
        ) from None
    # As for its tracker: where its server is away, its own defaults wait for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        numbers = to_mlflow(registry, MlflowClient(tracking_uri=uri or None, registry_uri=uri or None))
    except (MlflowException, OSError) as error:
        raise FedLLMError(f"MLflow did not take it: {type(error).__name__}: {first_line(error)}") from None
    if as_json:
        print(json.dumps({"model": registry.name, "versions": numbers}))
    else:
        print(f"{registry.name}: {len(numbers)} versions are in MLflow, with their aliases")


def to_mlflow(registry: Registry, client: Any) -> dict[int, str]:
    """Bring a registered model of MLflow up to a registry; return MLflow's number of each version."""
    name = registry.name
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, tags={"fedllm": "registry"})
    found = client.search_model_versions(f"name = '{name}'")
    known, numbers = {each.tags.get(DIGEST): str(each.version) for each in found}, {}
    for version in registry.versions():
        numbers[version.number] = known.get(version.digest) or _create(client, name, version)
        if version.mark:
            client.set_model_version_tag(name, numbers[version.number], MARK, version.mark)
        for alias in version.aliases:
            client.set_registered_model_alias(name, alias, numbers[version.number])
    return numbers


def _create(client: Any, name: str, version: Version) -> str:
    """Add a version to MLflow, its files in a run of their own; a kill leaves at most that run."""
    experiment = client.get_experiment_by_name(name)
    place = experiment.experiment_id if experiment else client.create_experiment(name)
    tags = {NUMBER: str(version.number), **_lineage(version)}
    run = client.create_run(place, run_name=f"{name} {version.number}")
    client.log_artifacts(run.info.run_id, str(version.folder), "adapter")
    client.set_terminated(run.info.run_id)
    source = f"{run.info.artifact_uri}/adapter"
    made = client.create_model_version(name, source, run.info.run_id, tags=tags, await_creation_for=0)
    return str(made.version)


def _lineage(version: Version) -> dict[str, str]:
    """Return how a version came about, as tags; what is too long for one stands in the signature alone."""
    said = version.statement
    parts = ("parents", "run", "base", "app", "clients", "privacy", "consent", "memorisation", "gates")
    known = {part: getattr(said, part) for part in (*parts, "unlearning") if getattr(said, part)}
    tags = {part: json.dumps(value, sort_keys=True) for part, value in known.items()}
    tags |= {"digest": version.digest, "signer": version.signer}
    return {f"fedllm.{part}": value for part, value in tags.items() if len(value) <= LONGEST_TAG}
