"""The distillation step of a run: when it is due, on which texts and who judges it."""

from dataclasses import dataclass

from fedllm.config.keys import DistillConfig
from fedllm.config.run_config import RunConfig
from fedllm.plan.privacy import PrivacyPlan

SYNTHETIC = "synthetic"
HELD_OUT_SHARE = 0.25  # held-out texts for each text that is distilled on


def num_held_out(number: int) -> int:
    """Return how many texts are held out where so many are distilled on."""
    return max(1, round(HELD_OUT_SHARE * number))


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """The keys of `distill` (`numbers`) and what follows from them together with other keys.

    `public_source` is where public text comes from, "" where there is none. `is_screened` says whether
    synthetic texts pass the gates of originality, `asks_clients` whether clients judge the student too, on
    rows that they keep back.
    """

    numbers: DistillConfig
    last_round: int
    public_source: str
    has_synthetic: bool
    is_screened: bool
    asks_clients: bool

    def is_due(self, round_num: int) -> bool:
        """Return whether a round ends with a distillation step."""
        return self.numbers.when == "every" or round_num == self.last_round

    @property
    def num_held_out(self) -> int:
        """How many texts are held out beside those that are distilled on."""
        return num_held_out(self.numbers.num_texts)

    @property
    def num_public(self) -> int:
        """How many of the texts to distil on are public."""
        if not self.public_source:
            return 0
        number = self.numbers.num_texts
        return max(1, number // 2) if self.has_synthetic else number

    @property
    def num_screened(self) -> int:
        """How many synthetic texts a step screens: without public text the held-out ones too."""
        number = self.numbers.num_texts
        return number - self.num_public if self.num_public else number + self.num_held_out


def distillation_plan(config: RunConfig, privacy: PrivacyPlan | None) -> DistillationPlan | None:
    """Return the distillation plan of a run, None where it never distils."""
    if config.distill.when == "never":
        return None
    text = config.distill.text.strip()
    public = "" if text == SYNTHETIC else text.removeprefix(f"{SYNTHETIC}+").strip()
    wanted = config.distill.originality
    return DistillationPlan(
        numbers=config.distill,
        last_round=config.federation.num_rounds,
        public_source=public,
        has_synthetic=text == SYNTHETIC or text.startswith(f"{SYNTHETIC}+"),
        # What private adapters write is private already, so it needs no screening.
        is_screened=wanted == "on" or (wanted == "auto" and privacy is None),
        asks_clients=_asks_clients(config, privacy, public),
    )


def _asks_clients(config: RunConfig, privacy: PrivacyPlan | None, public_source: str) -> bool:
    """Return whether the clients too judge a distilled adapter.

    Unless the run says so, they do where all text is synthetic: that a student follows what the clients'
    adapters wrote does not show that it is right.
    """
    if config.distill.gate != "auto":
        return config.distill.gate == "clients"
    may_be_had = privacy is None or privacy.metrics != "withheld"
    has_rows = config.data.held_out_fraction * config.data.max_held_out > 0
    return has_rows and may_be_had and not public_source
