"""What the head keeps of its calls, and whom it blames; without processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from stagewire.errors import StageLost

pytestmark = pytest.mark.vllm


@pytest.fixture
def journal() -> Any:
    from stagewire.vllm_plugin.member.journal import Journal

    return Journal()


def add(journal: Any, call_id: int, method: str, *args: Any) -> None:
    journal.add(call_id, method, args, f"{method} {call_id}".encode())


def methods(journal: Any) -> list[tuple[int, str]]:
    return [(call_id, method) for call_id, method, _ in journal.entries()]


def lora(number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"a{number}", number, "/a")


class TestJournal:
    def test_it_keeps_what_makes_a_stage_and_nothing_else(self, journal: Any) -> None:
        for call_id, method in enumerate(
            ["get_kv_cache_spec", "determine_available_memory", "initialize_from_config", "compile_or_warm_up_model"]
        ):
            add(journal, call_id, method)
        add(journal, 9, "get_stage_state")
        assert methods(journal) == [
            (1, "determine_available_memory"),
            (2, "initialize_from_config"),
            (3, "compile_or_warm_up_model"),
        ]

    def test_a_start_up_call_made_again_replaces_the_first(self, journal: Any) -> None:
        add(journal, 1, "initialize_from_config")
        add(journal, 2, "initialize_from_config")
        assert journal.entries() == [(2, "initialize_from_config", b"initialize_from_config 2")]

    def test_adapters_come_and_go(self, journal: Any) -> None:
        add(journal, 1, "add_lora", lora(7))
        add(journal, 2, "add_lora", lora(8))
        add(journal, 3, "pin_lora", 7)
        add(journal, 4, "remove_lora", 8)
        assert methods(journal) == [(1, "add_lora"), (3, "pin_lora")]
        add(journal, 5, "remove_lora", 7)
        assert methods(journal) == []

    def test_after_a_call_that_was_lost_half_way_every_stage_runs_the_adapters_calls_again(self, journal: Any) -> None:
        add(journal, 1, "add_lora", lora(7))
        add(journal, 2, "add_lora", lora(8))
        add(journal, 3, "pin_lora", 7)
        assert journal.renumber_adapter(7, 50) == 52
        assert methods(journal) == [(2, "add_lora"), (50, "add_lora"), (51, "pin_lora")]

    def test_a_pinned_adapter_is_added_last(self, journal: Any) -> None:
        """With room for two: in use, 7 outlived 8 and 9, which came later. Replayed in that order it would be gone."""
        for call_id, number in enumerate((7, 8, 9), start=1):
            add(journal, call_id, "add_lora", lora(number))
        add(journal, 4, "pin_lora", 7)
        assert methods(journal) == [(2, "add_lora"), (3, "add_lora"), (1, "add_lora"), (4, "pin_lora")]

    def test_who_wakes_up_is_not_put_to_sleep_again(self, journal: Any) -> None:
        add(journal, 1, "sleep", 1)
        assert methods(journal) == [(1, "sleep")]
        add(journal, 2, "wake_up", None)
        assert methods(journal) == []

    def test_nor_who_wakes_up_in_parts(self, journal: Any) -> None:
        add(journal, 1, "sleep", 1)
        add(journal, 2, "wake_up", ["weights"])
        assert methods(journal) == [(1, "sleep"), (2, "wake_up")]
        add(journal, 3, "wake_up", ["kv_cache"])
        assert methods(journal) == []
        add(journal, 4, "sleep", 1)
        add(journal, 5, "wake_up", ["kv_cache"])
        assert methods(journal) == [(4, "sleep"), (5, "wake_up")]


class TestSuspicion:
    @pytest.fixture
    def suspicion(self) -> Any:
        from stagewire.vllm_plugin.head.suspects import Suspicion

        return Suspicion()

    def note(
        self, suspicion: Any, step: int, in_flight: list[str], tokens: dict[str, int], stage: int = 1
    ) -> list[str]:
        from stagewire.vllm_plugin.head.suspects import Loss

        loss = Loss(StageLost(stage, "gone", step), in_flight if step >= 0 else [], in_flight)
        found: list[str] = suspicion.note(loss, self.requests(tokens))
        return found

    @staticmethod
    def requests(tokens: dict[str, int]) -> dict[str, Any]:
        return {req_id: Mock(num_output_tokens=count) for req_id, count in tokens.items()}

    def test_after_a_failed_step_its_requests_run_one_by_one(self, suspicion: Any) -> None:
        tokens = {"a": 2, "b": 2, "c": 9}
        assert self.note(suspicion, 5, ["a", "b"], tokens) == []
        assert suspicion.next_suspect(self.requests(tokens)) == "a"
        tokens["a"] = 3  # cleared by its next token
        assert suspicion.next_suspect(self.requests(tokens)) == "b"
        assert self.note(suspicion, 6, ["b"], tokens) == ["b"]
        del tokens["b"]
        assert suspicion.next_suspect(self.requests(tokens)) is None

    def test_a_failed_step_is_forgotten_with_the_next_token(self, suspicion: Any) -> None:
        assert self.note(suspicion, 5, ["a"], {"a": 2}) == []
        assert self.note(suspicion, 905, ["a"], {"a": 900}) == []
        assert self.note(suspicion, 906, ["a"], {"a": 900}) == ["a"]

    def test_neighbours_are_not_condemned(self, suspicion: Any) -> None:
        tokens = {"a": 2, "b": 2}
        for step in (5, 6, 7):
            assert self.note(suspicion, step, ["a", "b"], tokens) == []

    def test_a_dying_stage_is_not_a_requests_fault_while_it_gets_on(self, suspicion: Any) -> None:
        for count in range(100):
            assert self.note(suspicion, -1, ["a"], {"a": count}) == []
            assert suspicion.next_suspect(self.requests({"a": count})) is None

    def test_but_it_is_when_it_never_does(self, suspicion: Any) -> None:
        tokens = {"a": 3, "b": 0}
        assert self.note(suspicion, -1, ["a", "b"], tokens) == []
        assert suspicion.next_suspect(self.requests(tokens)) is None
        assert self.note(suspicion, -1, ["a", "b"], tokens) == []
        assert suspicion.next_suspect(self.requests(tokens)) == "a"
        for condemned in ([], [], [], ["a"]):
            assert self.note(suspicion, -1, ["a"], tokens) == condemned

    def test_it_is_failed_before_a_launcher_gives_up(self) -> None:
        from stagewire.launch.restarts import DEFAULT_MAX_RESTARTS
        from stagewire.vllm_plugin.head.suspects import MAX_DEATHS_ALONE, SUSPICIOUS_DEATHS

        assert MAX_DEATHS_ALONE + SUSPICIOUS_DEATHS <= DEFAULT_MAX_RESTARTS

    def test_who_kills_one_stage_and_then_another_condemns_nobody(self, suspicion: Any) -> None:
        """It was seen in a hundred kills at random: a long prompt, on a machine that was busy with other things."""
        for stage in (1, 1, 1, 2, 2, 3, 3, 3, 1, 2, 2, 2):
            assert self.note(suspicion, -1, ["a"], {"a": 0}, stage) == []

    def test_also_when_it_was_alone_from_the_beginning(self, suspicion: Any) -> None:
        for condemned in ([], [], [], [], ["a"]):
            assert self.note(suspicion, -1, ["a"], {"a": 0}) == condemned

    def test_it_forgets_with_the_request(self, suspicion: Any) -> None:
        assert self.note(suspicion, 5, ["a"], {"a": 0}) == []
        assert suspicion.next_suspect({}) is None
        assert self.note(suspicion, 7, ["a"], {"a": 0}) == []
