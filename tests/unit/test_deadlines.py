"""How long a step may be away."""

from __future__ import annotations

from stagewire.observe.deadlines import FACTOR, MIN_LIMIT_S, StepDeadlines


def test_a_step_larger_than_all_before_has_the_whole_limit() -> None:
    deadlines = StepDeadlines(300)
    assert deadlines.limit_s(1) == 300
    deadlines.add(16, 0.1)
    assert deadlines.limit_s(2048) == 300


def test_it_is_a_multiple_of_what_such_steps_took() -> None:
    deadlines = StepDeadlines(300)
    deadlines.add(2048, 12.0)
    deadlines.add(2000, 5.0)
    assert deadlines.limit_s(2048) == 12.0 * FACTOR
    deadlines.add(2047, 14.0)
    deadlines.add(2047, 9.5)
    assert deadlines.limit_s(1500) == 14.0 * FACTOR


def test_a_smaller_step_may_take_what_a_larger_one_took() -> None:
    deadlines = StepDeadlines(300)
    deadlines.add(1, 0.05)
    assert deadlines.limit_s(1) == MIN_LIMIT_S
    deadlines.add(2048, 12.0)
    assert deadlines.limit_s(1) == deadlines.limit_s(2048) == 12.0 * FACTOR


def test_it_never_exceeds_what_a_person_allowed_nor_is_it_short() -> None:
    deadlines = StepDeadlines(300)
    deadlines.add(8, 60.0)
    assert deadlines.limit_s(8) == 300
    impatient = StepDeadlines(5)
    impatient.add(8, 0.01)
    assert impatient.limit_s(8) == 5


def test_other_stages_are_learnt_anew() -> None:
    deadlines = StepDeadlines(300)
    deadlines.add(8, 0.01)
    deadlines.forget()
    assert deadlines.limit_s(8) == 300
