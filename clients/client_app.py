"""What Flower loads at a node, by the name `app`.

It imports neither torch nor transformers: Flower starts a process for every message, and where a site's
service answers, that process only carries the message.
"""

from flwr.app import Context, Message

from clients.kinds import make_app


def answer_here(message: Message, context: Context) -> Message:
    """Answer in this process, which keeps what it has opened for the next message."""
    from clients.answering import answer  # brings torch and transformers
    from clients.process import own_process

    return answer(own_process(), message, context)


app = make_app(answer_here)
