"""What a card says of base, data and results, to a reader and to the hub, and whom it never names."""

from collections.abc import Callable, Mapping

import pytest
from huggingface_hub import ModelCard

from fedllm.adapters.layout import initial_adapter
from fedllm.messages import JoinedClient
from fedllm.models.base import describe_layout
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.card import model_card, with_answers

BEFORE = {"anna": 4.0, "ben": 8.0, "cleo": 6.0}
AFTER = {"anna": 3.5, "ben": 4.0, "cleo": 6.5}
ROWS = {"anna": 20, "ben": 1000, "cleo": 7}


@pytest.fixture
def card_of(make_config: Callable) -> Callable[..., tuple[str, ServerState]]:
    """Return a function (losses before, after, keys) -> the card of a run with them, and its state."""

    def do(before: Mapping, after: Mapping, keys: Mapping | None = None) -> tuple[str, ServerState]:
        config = make_config({"run.name": "clinics", **(keys or {})})
        adapter = initial_adapter(describe_layout(config.model, config.lora), 0)
        last = RoundRecord(round_num=1, held_out=after, adapter=adapter.digest)
        state = ServerState(1, adapter, records=(RoundRecord(round_num=0, held_out=before), last))
        shared = {"node_id": 0, "num_held_out": 2, "fingerprint": adapter.layout.fingerprint}
        joined = {name: JoinedClient(client_id=name, num_train=ROWS[name], **shared) for name in ROWS}
        return model_card(resolve(config), resolve_model(config.model.name), state, joined), state

    return do


def test_the_hub_reads_the_losses_of_a_card(card_of: Callable) -> None:
    card, _ = card_of(BEFORE, AFTER)
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("peft", "text-generation", "clinics")
    found = {result.metric_name.rpartition(", ")[2]: result.metric_value for result in data.eval_results}
    assert found == {"mean over data holders": pytest.approx(14 / 3, abs=1e-4), "worst data holder": 6.5}


def test_a_card_gives_each_holders_losses_without_its_name(card_of: Callable) -> None:
    card, _ = card_of(BEFORE, AFTER)
    rows = ["| gained 4.0000 | 8.0000 | 4.0000 |", "| gained 0.5000 | 4.0000 | 3.5000 |"]
    assert "\n".join([*rows, "| gained -0.5000 | 6.0000 | 6.5000 |"]) in card
    assert not any(name in card for name in BEFORE)


def test_a_card_counts_the_rows_and_names_the_whole_base(card_of: Callable) -> None:
    card, state = card_of(BEFORE, AFTER)
    assert "1,027 rows to train on, 7 to 1,000 each, and 6 to measure on" in card
    assert f"(fingerprint `{state.adapter.layout.fingerprint}`)" in card
    assert "Licence of the base model: unknown" in card


@pytest.mark.parametrize(("planned", "words"), [(1, "1 round of"), (3, "1 of 3 rounds of")])
def test_a_card_counts_its_rounds(card_of: Callable, planned: int, words: str) -> None:
    card, _ = card_of(BEFORE, AFTER, {"federation.num-rounds": planned})
    assert f"\n{words} federated fine-tuning" in card


def test_under_a_privacy_plan_a_card_counts_and_lists_nothing(card_of: Callable) -> None:
    card, _ = card_of(BEFORE, AFTER, {"privacy.epsilon": 8.0, "privacy.unit": "client"})
    assert "1,027" not in card
    assert "gained" not in card


def test_what_was_not_measured_is_no_result_on_the_hub(card_of: Callable) -> None:
    card, _ = card_of({}, {})
    assert "model-index" not in card
    assert "Not measured." in card


def test_answers_on_a_card_are_replaced() -> None:
    answers = {"prompts": ["Why?"], "before": ["No."], "after": ["Yes."]}
    once = with_answers("# A card\n", answers)
    again = with_answers(once, {**answers, "after": ["Indeed."]})
    assert "after:  Indeed." in again
    assert "Yes." not in again
    assert with_answers(again, {"prompts": [], "before": [], "after": []}) == again
