"""What a site's SuperExec starts in place of Flower's `flwr-clientapp`: the site's own messenger.

Flower would unpack the code that the server has sent and run it. Here its SHA-256 is shown to the service,
which gives a ticket where the site's owner admits that bundle; none of its code ever runs at the site. The
launch key that proves the node is taken from the environment before anything else happens.
"""

import argparse
import hashlib
import logging
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token

from clients.kinds import make_app
from clients.messenger import carry, connected, post
from clients.site_protocol import LAUNCH_KEY, SOCKET, TICKET
from fedllm.errors import FedLLMError
from fedllm.wire.refusals import refusal

_OURS = "fedllm/fedllm"  # Flower's id of fedllm's bundle

_logger = logging.getLogger("fedllm.messenger")


def main() -> None:
    """Do what `flwr-clientapp` does for one message, with the site's messenger for the bundle's app."""
    launch_key = os.environ.pop(LAUNCH_KEY, "")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="flwr-clientapp")
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser=parser)
    options = parser.parse_args()
    bundles: list[str] = []
    flower: Any = import_module("flwr.supernode.runtime.run_clientapp")
    # The three places where Flower would unpack the bundle, find it, and load its app.
    flower.install_from_fab = partial(_note, bundles)
    flower.get_load_client_app_fn = lambda **unused: partial(_app_for, launch_key, bundles)
    flower.run_clientapp(
        runtime_api_address=options.runtime_api_address,
        token=try_obtain_flwr_app_token(options),
        insecure=True,  # a SuperNode's own port on loopback
        parent_pid=options.parent_pid,
        runtime_dependency_install=False,
    )


def _note(bundles: list[str], content: bytes, **unused: Any) -> None:
    bundles.append(hashlib.sha256(content).hexdigest())


def _app_for(launch_key: str, bundles: list[str], app_id: str, version: str, told_hash: str) -> ClientApp:
    """Return the app that answers for a bundle: the site's messenger, or one that only refuses."""
    try:
        with connected(os.environ[SOCKET]) as service:
            told = {"bundle": bundles[-1], "version": version if app_id == _OURS else ""}
            ticket = post(service, "/v1/ticket", launch_key, json=told).json()["ticket"]
    except FedLLMError as error:
        _logger.error("%s: %s", error.code, error)
        return make_app(_refuse_with(error.code))
    return make_app(partial(carry, variables={SOCKET: os.environ[SOCKET], TICKET: ticket}))


def _refuse_with(code: str) -> Callable[[Message, Context], Message]:
    return lambda message, context: refusal(message, code)


if __name__ == "__main__":
    main()
