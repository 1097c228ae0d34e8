"""Which rank each client trains at: all the same, dealt in turn, or given by name."""

from collections.abc import Iterable

from fedllm.errors import ConfigError

MOST_CANARIES = 100_000
CANARY_TOKENS = 16  # of a canary, drawn at random: no text that anyone writes begins to be like it


def deal_ranks(text: str, client_ids: Iterable[str], rank: int) -> dict[str, int]:
    """Return the rank of every client that `lora.client-ranks` = `text` gives under `lora.rank` = `rank`.

    "" gives all of them `rank`. "4,8,16" is dealt in turn over the sorted ids. "anna:4,ben:8" names clients;
    the others have `rank`.

    Raises:
        ConfigError: `text` is of another form, names a client twice or holds a rank outside 1..`rank`.
    """
    clients = sorted(client_ids)
    if not text:
        return dict.fromkeys(clients, rank)
    names, ranks = _parse(text, rank)
    if names:
        named = dict(zip(names, ranks, strict=True))
        return {client: named.get(client, rank) for client in clients}
    # By sorted id, so that every machine deals alike.
    return {client: ranks[place % len(ranks)] for place, client in enumerate(clients)}


def are_mixed(text: str, rank: int) -> bool:
    """Return whether `lora.client-ranks` gives clients different ranks; raises as `deal_ranks`."""
    names, ranks = _parse(text, rank) if text else ([], [])
    return len({*ranks, *([rank] if names else [])}) > 1


def named_clients(text: str, rank: int) -> list[str]:
    """Return the clients that `lora.client-ranks` names; raises as `deal_ranks`."""
    return _parse(text, rank)[0] if text else []


def _parse(text: str, rank: int) -> tuple[list[str], list[int]]:
    """Return (names or nothing, ranks) in the order of the text."""
    pairs = [entry.rpartition(":") for entry in text.split(",")]
    names = [name.strip() for name, colon, _ in pairs if colon]
    values = [value.strip() for _, _, value in pairs]
    each_once = not names or ("" not in names and len(set(names)) == len(pairs))
    allowed = {str(number) for number in range(1, rank + 1)}
    if not each_once or not allowed.issuperset(values):
        raise ConfigError(
            f"lora.client-ranks = {text!r}: expected ranks from 1 to lora.rank = {rank}, dealt in turn as in"
            " 4,8,16, or for each client once as in anna:4,ben:8"
        )
    return names, [int(value) for value in values]


def parse_canaries(value: int | str) -> tuple[int, tuple[int, ...]]:
    """Return the number of canaries, and the copies dealt to them, of `audit.canaries` = "60:1,4,16".

    Raises:
        ConfigError: one of the numbers is not whole, a canary has no copy or there are too many canaries.
    """
    count, colon, copies = str(value).partition(":")
    parts = [part.strip() for part in copies.split(",")] if colon else ["1"]
    are_whole = all(part.isdecimal() for part in (count, *parts))
    if not are_whole or int(count) > MOST_CANARIES or not all(map(int, parts)):
        raise ConfigError(
            f"audit.canaries = {value!r}: expected a whole number up to {MOST_CANARIES:,}, then perhaps the"
            " copies of each in turn, as in 60:1,4,16"
        )
    return int(count), tuple(map(int, parts))
