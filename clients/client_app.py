"""What Flower loads at a node, by the name `app`.

It imports neither torch nor transformers: Flower starts a process for every message, and where a site's
service answers ($FEDLLM_SITE_SOCKET), that process only carries the message.
"""

import os

from flwr.app import Context, Message

from clients.kinds import make_app
from clients.messenger import carry
from clients.site_protocol import SOCKET


def answer(message: Message, context: Context) -> Message:
    """Let the site's service answer, where this machine has one, else answer in this process."""
    if SOCKET in os.environ:
        return carry(message, context, os.environ)
    # These bring torch and transformers. What the process opens it keeps for the next message.
    from clients import answering
    from clients.process import own_process

    return answering.answer(own_process(), message, context)


app = make_app(answer)
