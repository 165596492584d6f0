"""Who may take part in a pipeline: what stages must agree on, who holds an index, and the words of a refusal.

When two stages differ, one of them is wrong:

    what differs                                       who is wrong
    order, gap or overlap of neighbours' layers        the higher index
    a shared setting                                   the stage that is not the head
    model, values of the weights, pre-split export:    the stage that differs from the first one that knows
    a stage may not know these of its own folder       its own

Knows identities, and times as arguments. Connections, phases, and what a refusal leads to are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from stagewire.plan.ranges import LayerRange, check_adjacent
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import clip
from stagewire.wire.messages import Refused, StageIdentity

__all__ = [
    "EXPORT_SETTING",
    "MAX_BAD_HANDSHAKES",
    "MODEL_SETTING",
    "WEIGHTS_SETTING",
    "Holder",
    "Verdict",
    "duplicate_refusal",
    "folder_refusal",
    "pipeline_refusal",
    "range_refusal",
    "settings_refusal",
]

# After this many failed handshakes in a row, the listener at an address is no stage.
MAX_BAD_HANDSHAKES = 3
# The shared settings that a stage may leave empty. It then fits any other stage.
# What the headers in the model's folder say; unknown to a stage with a part of the files.
MODEL_SETTING = "model"
# The pre-split export that the folder belongs to; a stage that loads from the full checkpoint has none.
EXPORT_SETTING = "pre-split export"
# A sample of the values of all weights; unknown to a stage that has only a part of them.
WEIGHTS_SETTING = "values of the weights"
_MAY_BE_EMPTY = frozenset((MODEL_SETTING, EXPORT_SETTING, WEIGHTS_SETTING))
# Bounds what strangers can make this stage remember.
MAX_CLAIMS = 16


class Verdict(Enum):
    """The decision about a newcomer that claims an index which another process holds."""

    REFUSED = "the holder answers"
    WAITS = "too early to tell"
    TAKES_OVER = "the holder is silent"


@dataclass
class Holder:
    """The process that has an index, and since when other processes (by incarnation) have claimed it."""

    identity: StageIdentity
    heard_at: float
    claims: dict[str, float] = field(default_factory=dict, kw_only=True)

    def judge(self, claimant: str, now: float) -> Verdict:
        """The holder keeps its index if it is heard after the claim. `timeouts.ALIVE_S` of silence lose it."""
        if len(self.claims) >= MAX_CLAIMS:
            self.claims.clear()
        since = self.claims.setdefault(claimant, now)
        if self.heard_at > since:
            del self.claims[claimant]
            return Verdict.REFUSED
        return Verdict.TAKES_OVER if now - since >= timeouts.ALIVE_S else Verdict.WAITS


def duplicate_refusal(stage: int) -> Refused:
    text = (
        f"there is already a stage {stage} in this pipeline and it answers: "
        f"give this one another --pipeline-stage-idx, or stop the other"
    )
    return Refused(stage, "--pipeline-stage-idx", "one process per index", str(stage), text)


def range_refusal(earlier: StageIdentity, later: StageIdentity) -> Refused | None:
    """The refusal of the later of two neighbours, whose layers do not begin where the earlier one's end."""
    found = _layers(later)
    problem = check_adjacent(earlier.stage, _layers(earlier), later.stage, found)
    if problem is None:
        return None
    expected = f"a range that starts at {earlier.layer_end}"
    return Refused(later.stage, "--pipeline-layer-range", expected, str(found), problem)


def pipeline_refusal(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """The refusal of a stage that is of another pipeline than the head: it has another number of stages, or id."""
    return _first_difference(
        other.stage,
        [
            _Setting("--pipeline-total-stages", str(head.num_stages), str(other.num_stages)),
            _Setting("--pipeline-id", head.pipeline_id or "(not set)", other.pipeline_id or "(not set)"),
        ],
    )


def settings_refusal(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """The refusal of a stage that differs from the head in a setting; for weights and exports see `folder_refusal`."""
    names = [*head.shared, *(name for name in other.shared if name not in head.shared)]
    names = [name for name in names if name not in _MAY_BE_EMPTY or _is_model_known(name, head, other)]
    settings = [
        _Setting(name, head.shared.get(name, "(not set)"), other.shared.get(name, "(not set)")) for name in names
    ]
    return pipeline_refusal(head, other) or _first_difference(other.stage, settings)


def _is_model_known(name: str, head: StageIdentity, other: StageIdentity) -> bool:
    """Whether a setting that may be empty is compared with the head's: only the model is, and only if both know it."""
    return name == MODEL_SETTING and all(each.shared.get(name) != "" for each in (head, other))


def folder_refusal(roll: Sequence[StageIdentity], other: StageIdentity) -> Refused | None:
    """The refusal of a stage with another model, other weights or another export than the first that knows its own.

    The head may not know its own, so a stage is compared with all stages in ``roll``.
    """
    for setting, describe in _FOLDER_SETTINGS.items():
        first = next((identity for identity in roll if identity.shared.get(setting)), None)
        found = other.shared.get(setting)
        if first is not None and found and found != first.shared[setting]:
            expected = first.shared[setting]
            text = describe(other.stage, clip(found), first.stage, clip(expected))
            return Refused(other.stage, setting, expected, found, text)
    return None


def _other_model(stage: int, found: str, first: int, expected: str) -> str:
    return (
        f"{MODEL_SETTING} is {found} on stage {stage} but {expected} on stage {first}: all stages need the same; start "
        f"stage {stage} with stage {first}'s value"
    )


def _other_weights(stage: int, found: str, first: int, expected: str) -> str:
    return (
        f"stage {stage} has other weights than stage {first}, under the same names and in the same shapes: a sample "
        f"of their values gives {found} on stage {stage} and {expected} on stage {first}. One folder is a fine-tuned "
        "model, or was copied by half: compare `sha256sum` of the weight files on both machines, copy the right ones, "
        f"and start stage {stage} again"
    )


def _other_export(stage: int, found: str, first: int, expected: str) -> str:
    return (
        f"stage {stage}'s folder is of {EXPORT_SETTING} {found} but stage {first}'s of {expected}: their weights may "
        f"be of different models; start stage {stage} from stage_{stage} of the same export"
    )


# In the order in which they are compared, with the words of each refusal.
_FOLDER_SETTINGS = {MODEL_SETTING: _other_model, WEIGHTS_SETTING: _other_weights, EXPORT_SETTING: _other_export}


def _layers(identity: StageIdentity) -> LayerRange:
    return LayerRange(identity.layer_start, identity.layer_end)


@dataclass(frozen=True)
class _Setting:
    """One setting as the head has it, and as another stage has it."""

    name: str
    expected: str
    found: str


def _first_difference(stage: int, settings: Sequence[_Setting]) -> Refused | None:
    for setting in settings:
        if setting.expected != setting.found:
            text = (
                f"{setting.name} is {clip(setting.found)} on stage {stage} but {clip(setting.expected)} on stage 0: "
                f"all stages need the same; start stage {stage} with stage 0's value"
            )
            return Refused(stage, setting.name, setting.expected, setting.found, text)
    return None
