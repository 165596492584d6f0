"""The ring's tables: what follows what, which message counts when, and that docs/reference/wire.md shows just that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.phases import RULES, TRANSITIONS, Change, Phase, Reception, Role, Rule, next_phase, receive
from stagewire.wire.messages import KINDS, Hello, Message, Sample
from unit.ring_harness import MemoryRing
from unit.test_wire_codec import EXAMPLES

DOCS = Path(__file__).parents[2] / "docs"
ALIVE = [phase for phase in Phase if not phase.is_over]
MESSAGES: dict[type, Message] = {type(message): message for message, _ in EXAMPLES}
IDS = [f"{rule.side.value}-{rule.message.__name__}" for rule in RULES]


def row(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def phases_table() -> Iterator[str]:
    yield row("what happens", *(phase.name for phase in ALIVE))
    yield "|---" * (1 + len(ALIVE)) + "|"
    for change in Change:
        yield row(change.value, *(describe_next(phase, change) for phase in ALIVE))


def describe_next(phase: Phase, change: Change) -> str:
    roles = [role for role in Role if phase in TRANSITIONS[role]]
    after = {role: next_phase(role, phase, change) for role in roles}
    if len(set(after.values())) == 1:
        found = after[roles[0]]
        return "" if found is None else str(found.name)
    return ", ".join(f"{role.value}: {found.name}" for role, found in after.items() if found)


def messages_table() -> Iterator[str]:
    yield row("from", "message", "to", "taken in", "else", "what follows")
    yield "|---" * 6 + "|"
    for rule in RULES:
        heard_by = "" if len(rule.heard_by) == 2 else rule.heard_by[0].value
        phases = "" if set(rule.phases) == set(ALIVE) else ", ".join(phase.name for phase in rule.phases)
        taken = f"{phases}, this epoch" if rule.is_of_epoch else phases
        yield row(rule.side.value, f"`{rule.message.__name__}`", heard_by, taken, describe_else(rule), rule.follows)


def describe_else(rule: Rule) -> str:
    cases = {"before Welcome": rule.before_welcome}
    if set(rule.phases) != set(ALIVE) or rule.is_of_epoch:
        cases["otherwise"] = rule.otherwise
    found = {case: str(reception.value) for case, reception in cases.items() if reception is not Reception.TAKEN}
    if len(set(found.values())) == 1 and len(found) == 2:
        return next(iter(found.values()))
    return ", ".join(f"{case}: {text}" for case, text in found.items())


@pytest.mark.parametrize("table", [phases_table, messages_table])
def test_the_page_about_the_wire_shows_the_tables(table: Callable[[], Iterator[str]]) -> None:
    (page,) = DOCS.rglob("wire.md")
    text = "\n".join(table())
    assert text in page.read_text(), f"{page} has another table than:\n{text}"


@pytest.mark.parametrize("role", Role)
def test_whoever_lives_can_fail_and_stop_and_whoever_has_left_stays_away(role: Role) -> None:
    for phase, after in TRANSITIONS[role].items():
        if phase.is_over:
            assert not after
        else:
            assert (after[Change.FAILURE], after[Change.STOP]) == (Phase.FAILED, Phase.STOPPED)
        if phase.is_open:
            assert after[Change.LOSS] is Phase.LINKING


def test_only_the_head_opens_in_two_steps() -> None:
    assert Phase.OPENING not in TRANSITIONS[Role.WORKER]
    assert next_phase(Role.HEAD, Phase.LINKING, Change.OPEN_CAME) is None
    assert next_phase(Role.WORKER, Phase.LINKING, Change.OPEN_CAME) is Phase.OPEN


def test_every_message_has_a_rule_and_no_two() -> None:
    assert {rule.message for rule in RULES} == set(KINDS.values())
    assert len({(rule.side, rule.message) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_rule_says_what_becomes_of_its_message(rule: Rule) -> None:
    message = MESSAGES[rule.message]
    epoch = getattr(message, "epoch", 1)
    for role in Role:
        for phase in Phase:
            found = receive(rule.side, message, role, phase, epoch=epoch, is_linked=True)
            if phase.is_over:
                assert found is Reception.IGNORED
            elif phase not in rule.phases:
                assert found is rule.otherwise
            else:
                assert found is (Reception.TAKEN if role in rule.heard_by else Reception.BAD)
    if rule.is_of_epoch:
        for wrong in (epoch - 1, epoch + 1):
            found = receive(rule.side, message, Role.HEAD, Phase.SERVING, epoch=wrong, is_linked=True)
            assert found is Reception.STALE


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kind", KINDS.values())
def test_what_no_rule_has_is_bad_and_ignored_before_the_welcome(kind: type[Message], side: Side) -> None:
    if any((rule.side, rule.message) == (side, kind) for rule in RULES):
        return
    early = Reception.IGNORED if side is Side.PREDECESSOR else Reception.BAD
    for is_linked, reception in ((True, Reception.BAD), (False, early)):
        for phase in ALIVE:
            assert receive(side, MESSAGES[kind], Role.HEAD, phase, epoch=1, is_linked=is_linked) is reception


@pytest.mark.parametrize(("message", "counted"), [(MESSAGES[Hello], (0, 1)), (MESSAGES[Sample], (1, 0))])
def test_the_state_counts_what_the_table_says(message: Message, counted: tuple[int, int]) -> None:
    """Of the predecessor of a stage that serves: a greeting is bad, a message of another epoch is stale."""
    ring = MemoryRing()
    state = ring.start_serving()[2].ring.state
    assert state.received(Side.PREDECESSOR, b"", message, (), ring.clock.seconds) == []
    assert (state.num_stale_frames, state.num_bad_messages) == counted
