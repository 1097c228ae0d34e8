"""The distillation step of a run: when it is due, on which texts and who judges it."""

from dataclasses import dataclass

from fedllm.config.keys import DistillConfig
from fedllm.errors import ConfigError
from fedllm.originality.overlap import MAX_SHINGLES, MAX_TEXTS
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
        """How many texts are held out, besides those that are distilled on."""
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


def distillation_plan(
    section: DistillConfig, privacy: PrivacyPlan | None, *, num_rounds: int, holds_out: bool
) -> DistillationPlan | None:
    """Return the distillation plan of a run, None where it never distils.

    `holds_out` says whether clients hold rows out of training.

    Raises:
        ConfigError: there is no text, or more than data holders can be asked about.
    """
    if section.when == "never":
        return None
    text = section.text.strip()
    if not text:
        raise ConfigError(
            "distill.text is empty: there is nothing to distil on; set it to synthetic, to a source such as"
            " data.source takes, or to synthetic+SOURCE"
        )
    public = "" if text == SYNTHETIC else text.removeprefix(f"{SYNTHETIC}+").strip()
    # Neither public text nor what the clients' adapters wrote shows that a student is right for the clients:
    # they judge it, unless the run says otherwise or losses may not leave them.
    may_ask = holds_out and (privacy is None or privacy.metrics != "withheld")
    plan = DistillationPlan(
        numbers=section,
        last_round=num_rounds,
        public_source=public,
        has_synthetic=text == SYNTHETIC or text.startswith(f"{SYNTHETIC}+"),
        # What private adapters write is private already, so it needs no screening.
        is_screened=section.originality == "on" or (section.originality == "auto" and privacy is None),
        asks_clients=section.gate == "clients" or (section.gate == "auto" and may_ask),
    )
    # One overlap query is all that a round has to ask the data holders with.
    most = {"num-texts": (plan.num_screened, MAX_TEXTS), "max-tokens": (section.max_tokens, MAX_SHINGLES)}
    for key, (number, limit) in most.items():
        if plan.is_screened and plan.num_screened and number > limit:
            raise ConfigError(
                f"distill.{key}: data holders can be asked about {MAX_TEXTS} synthetic texts of"
                f" {MAX_SHINGLES} tokens in a round, and this is {number}; lower it, or set"
                " distill.originality = 'off'"
            )
    return plan
