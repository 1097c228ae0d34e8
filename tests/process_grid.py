"""A grid whose nodes are processes, forked from this one: they can be killed, stopped or short of memory."""

import os
import resource
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.answering import make_client_app
from clients.process import Process
from fedllm.config.run_config import RunConfig
from scripts.runtimes.local import node_config_of

_LARGE = 2**20  # bytes of a block
_TAKEN: list[np.ndarray] = []
_FORK = get_context("fork")  # with what this process has imported already


@dataclass(eq=False)
class Node:
    """One node: its process, the pipe to it, and the messages that it has not answered."""

    process: BaseProcess
    pipe: Connection
    asked: dict[str, Message] = field(default_factory=dict)

    def send(self, signal_number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid
        os.kill(self.process.pid, signal_number)


class ProcessGrid(Grid):
    """Asks its nodes through pipes. One that has died is away; `restart` brings it back."""

    def __init__(self, config: RunConfig, number: int, *, tells: bool):
        self.config, self.number = config, number
        self.tells = tells  # whether the death of a node is an answer, as a SuperLink's within 60 s
        self.after_push: Callable[[list[Message]], None] = lambda messages: None
        self.nodes: dict[int, Node] = {}
        for index in range(number):
            self.restart(index)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._run = replace(Run.create_empty(run_id=1), primary_task_type=TaskType.SERVER_APP)

    def restart(self, index: int, memory: int = 0) -> int:
        """Start the node of a partition, under an id that none had before, and return the id.

        `memory` is how many bytes it may take for training; 0 = any number.
        """
        node_id = 2 + index + self.number * sum(1 for node in self.nodes if (node - 2) % self.number == index)
        ours, theirs = _FORK.Pipe()
        context = Context(
            run_id=1,
            node_id=node_id,
            node_config=node_config_of(self.config, index, self.number),
            state=RecordDict(),
            run_config=dict(self.config.to_flat()),
        )
        process = _FORK.Process(target=_serve, args=(theirs, context, memory), daemon=True)
        process.start()
        theirs.close()
        self.nodes[node_id] = Node(process, ours)
        return node_id

    def set_run(self, run: Run) -> None:
        """Replace the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return the nodes that live; one that is stopped is thought to."""
        return [node_id for node_id, node in self.nodes.items() if node.process.is_alive()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; one to a dead node is lost."""
        messages, ids = list(messages), []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]
            node = self.nodes[message.metadata.dst_node_id]
            node.asked[ids[-1]] = message
            with suppress(OSError):
                node.pipe.send(message)
        self.after_push(messages)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the answers to these messages that have come."""
        wanted, found = set(message_ids), list[Message]()
        for node in self.nodes.values():
            asked = wanted & node.asked.keys()
            if asked and self.tells and not node.process.is_alive():
                gone = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="")
                found += [Message(gone, reply_to=node.asked.pop(message_id)) for message_id in asked]
            elif asked:
                with suppress(OSError, EOFError):
                    if node.pipe.poll():
                        reply = node.pipe.recv()
                        del node.asked[reply.metadata.reply_to_message_id]
                        found.append(reply)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Not used: fedllm has a loop of its own."""
        raise NotImplementedError


def _serve(pipe: Connection, context: Context, memory: int) -> None:
    # A fork has none of its parent's threads for matrix products and would wait for them for ever.
    torch.set_num_threads(1)
    app: ClientApp = make_client_app(Process())
    with suppress(EOFError):
        while True:
            message = pipe.recv()
            if message.metadata.message_type == "train" and memory:
                _limit_memory(memory)
            pipe.send(app(message, context))


@contextmanager
def process_grid(config: RunConfig, number: int, *, tells: bool = True) -> Iterator[ProcessGrid]:
    """Run so many nodes for the length of the block; none of their processes outlives it."""
    grid = ProcessGrid(config, number, tells=tells)
    try:
        yield grid
    finally:
        for node in grid.nodes.values():
            with suppress(ProcessLookupError):
                node.send(signal.SIGKILL)
            node.process.join()


def _limit_memory(more: int) -> None:
    """Let this process take so many bytes of memory more than it has, none of it in large blocks."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    # What the parent has freed is still the process's own, and could hold a whole training.
    with suppress(MemoryError):
        while True:
            _TAKEN.append(np.empty(_LARGE, dtype=np.uint8))
