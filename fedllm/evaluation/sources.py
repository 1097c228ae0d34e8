"""Where tasks come from: files, a folder of files, data sets of the hub, and suites of these by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fedllm.data.find_files import ACCEPTED, find_files
from fedllm.data.formats import READERS
from fedllm.data.rows import is_local, read_rows
from fedllm.errors import ConfigError, DataError
from fedllm.evaluation.read_items import make_task
from fedllm.evaluation.task import Task


@dataclass(frozen=True)
class Source:
    """A task's rows: a data set of the hub, pinned to a commit, or local files."""

    name: str
    rows: str  # as `data.source` takes it
    split: str


# Rows of the hub stay there: their licences differ. A pinned commit keeps figures comparable.
_GENERAL = (
    Source("piqa", "baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", "validation"),
    Source("arc_easy", "allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453:ARC-Easy", "test"),
    Source("openbookqa", "allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454:main", "test"),
    Source("boolq", "google/boolq@35b264d03638db9f4ce671b711558bf7ff0f80d5", "validation"),
    Source("mmlu", "cais/mmlu@c30699e8356da336a370243923dbaf21066bb9fe:all", "test"),
)
_KEYBOARD = (
    Source("tweets", "cardiffnlp/tweet_eval@b3a375baf0f409c77e6bc7aa35102b7b3534f8be:sentiment", "test"),
    Source(
        "wikitext", "Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3:wikitext-2-raw-v1", "test"
    ),
)
_MEDICAL = (
    Source("pubmedqa", "qiaojin/PubMedQA@9001f2853fb87cab8d220904e0de81ac6973b318:pqa_labeled", "train"),
    Source("medmcqa", "openlifescienceai/medmcqa@91c6572c454088bf71b679ad90aa8dffcd0d5868", "validation"),
    Source("medqa", "GBaker/MedQA-USMLE-4-options@0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18", "test"),
)
SUITES: Mapping[str, tuple[Source, ...]] = MappingProxyType(
    {"general": _GENERAL, "keyboard": _KEYBOARD, "medical": _MEDICAL}
)


def named_tasks(names: str, *, split: str = "test", limit: int | None = None) -> list[Task]:
    """Return the tasks of files, folders and hub ids that `names` has between commas.

    Each file is a task by its own name. Of a hub data set the rows of `split` count; its id may have a commit
    and a configuration, as in ID@COMMIT:CONFIGURATION. `limit` rows of each task are taken at most, spread
    over it evenly.

    Raises:
        ConfigError: two tasks have one name.
        DataError: a source cannot be read or there is none, or its columns are of no known form.
    """
    sources = [source for name in names.split(",") if name.strip() for source in _named(name.strip(), split)]
    if not sources:
        raise DataError(f"--tasks {names}: no file of tasks there; expected {ACCEPTED}, or hub ids")
    return _read(sources, limit)


def suite_tasks(suite: str, folder: str = "", *, limit: int | None = None) -> tuple[list[Task], list[str]]:
    """Return the tasks of a suite, and the names of those that `folder`, if one is given, does not have.

    Raises:
        ConfigError: there is no such suite.
        DataError: the hub is out of reach, or the folder has none of the tasks.
    """
    if suite not in SUITES:
        raise ConfigError(f"--suite {suite}: expected one of {', '.join(SUITES)}")
    if not folder:
        return _read(SUITES[suite], limit), []
    files = {source.name: source for source in _named(folder, "test")}
    found = [files[source.name] for source in SUITES[suite] if source.name in files]
    missing = [source.name for source in SUITES[suite] if source.name not in files]
    if not found:
        raise DataError(f"{folder}: none of the suite's files, {missing[0]}.jsonl and so on")
    return _read(found, limit), missing


def _named(name: str, split: str) -> list[Source]:
    if not is_local(name):
        return [Source(name.partition(":")[0].partition("@")[0].rpartition("/")[2], name, split)]
    folder = Path(name)
    files = sorted(folder.iterdir()) if folder.is_dir() else map(Path, find_files(name, split))
    return [Source(file.stem, str(file), split) for file in files if file.suffix.lower() in READERS]


def _read(sources: Sequence[Source], limit: int | None) -> list[Task]:
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two tasks are called {twice}; rename a file, or name the folder alone")
    tasks = []
    for source in sources:
        try:
            rows = read_rows(source.rows, split=source.split, on_bad_row="stop").rows
        except DataError as error:
            if is_local(source.rows):
                raise
            advice = "to work without the hub, save its rows as JSON lines and name the folder by --tasks"
            raise DataError(f"task {source.name}: {error}; {advice}") from None
        most = min(len(rows), limit or len(rows))
        # Spread over the whole: many sets are sorted by subject.
        tasks.append(make_task(source.name, [rows[place * len(rows) // most] for place in range(most)]))
    return tasks
