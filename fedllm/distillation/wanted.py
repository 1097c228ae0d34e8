"""Which texts a run wants to distil on, how many of them, and who judges the student."""

from typing import TYPE_CHECKING

from fedllm.privacy.plan import plan_of

if TYPE_CHECKING:
    from fedllm.config import RunConfig

SYNTHETIC = "synthetic"
HELD_OUT_SHARE = 0.25  # held-out texts for each text that is distilled on


def has_synthetic(text: str) -> bool:
    """Return whether `distill.text` asks for synthetic text."""
    return text.strip() == SYNTHETIC or text.strip().startswith(f"{SYNTHETIC}+")


def public_source(text: str) -> str:
    """Return the source of public text in `distill.text`, "" where it asks for none."""
    return "" if text.strip() == SYNTHETIC else text.strip().removeprefix(f"{SYNTHETIC}+").strip()


def held_out_number(number: int) -> int:
    """Return how many texts are held out beside so many."""
    return max(1, round(HELD_OUT_SHARE * number))


def num_public(text: str, number: int) -> int:
    """Return how many of `number` texts to distil on are public."""
    if not public_source(text):
        return 0
    return max(1, number // 2) if has_synthetic(text) else number


def num_screened(text: str, number: int) -> int:
    """Return how many synthetic texts are screened in a step that distils on `number` texts.

    Without public text those that are held out are synthetic too.
    """
    public = num_public(text, number)
    return number - public if public else number + held_out_number(number)


def asks_clients(config: "RunConfig") -> bool:
    """Return whether the clients too judge a distilled adapter, on rows that they keep back.

    Unless the run says so, they do where there is no other text than what their adapters wrote, which says
    that a student follows its teachers and not that they are right, and where their losses may be had.
    """
    if config.distill.gate != "auto":
        return config.distill.gate == "clients"
    plan = plan_of(config)
    may_be_had = plan is None or plan.metrics != "withheld"
    has_rows = config.data.held_out_fraction * config.data.max_held_out > 0
    return has_rows and may_be_had and not public_source(config.distill.text)
