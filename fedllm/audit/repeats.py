"""How often the canaries of a run stand among a client's rows, as a recipe writes it."""

from fedllm.errors import ConfigError


def parse_repeats(text: str) -> tuple[int, ...]:
    """Return the numbers in "1,4,16", at least one of them.

    Raises:
        ConfigError: one is not a whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"audit.canary-repeats = {text!r}: expected whole numbers such as 1 or 1,4,16")
    return tuple(int(part) for part in parts)
