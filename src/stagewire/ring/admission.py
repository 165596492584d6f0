"""Who may take part in a pipeline: what stages must agree on, who holds an index, and the words of a refusal.

Who is wrong when two stages differ: between neighbours the higher index (order, gap, overlap); in shared settings
whoever differs from the head, which is right by definition; in what a stage may not know of its own folder (the values
of all weights, the pre-split export) whoever differs from the first stage that knows.

Knows identities, and times as arguments; no connection, no phase, and not what a refusal leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from stagewire.plan.ranges import LayerRange, check_adjacent
from stagewire.ring.actions import clip
from stagewire.wire.messages import Refused, StageIdentity

__all__ = [
    "ALIVE_S",
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

# A stage that says nothing for this time may be replaced by a newcomer with its index.
ALIVE_S = 5.0
# Handshakes that fail, in a row, before what listens at an address counts as no stage at all.
MAX_BAD_HANDSHAKES = 3
# The shared settings that a stage may leave empty, and then fits any. What the headers of its folder say: a stage with
# a part of the files cannot tell.
MODEL_SETTING = "model"
# Which pre-split export its folder is of: a stage that loads from the full checkpoint has none.
EXPORT_SETTING = "pre-split export"
# A sample of the values of all weights: a stage that has only a part of them cannot tell.
WEIGHTS_SETTING = "values of the weights"
_MAY_BE_EMPTY = frozenset((MODEL_SETTING, EXPORT_SETTING, WEIGHTS_SETTING))
# Bounds what strangers can make us remember.
MAX_CLAIMS = 16


class Verdict(Enum):
    """About a newcomer with an index that somebody else holds."""

    REFUSED = "the holder answers"
    WAITS = "too early to tell"
    TAKES_OVER = "the holder is silent"


@dataclass
class Holder:
    """Who has an index so far, and since when which incarnations claim it too."""

    identity: StageIdentity
    heard_at: float
    claims: dict[str, float] = field(default_factory=dict, kw_only=True)

    def judge(self, claimant: str, now: float) -> Verdict:
        """Refused as soon as the holder has been heard after the claim; takes over after `ALIVE_S` of silence."""
        if len(self.claims) >= MAX_CLAIMS:
            self.claims.clear()
        since = self.claims.setdefault(claimant, now)
        if self.heard_at > since:
            del self.claims[claimant]
            return Verdict.REFUSED
        return Verdict.TAKES_OVER if now - since >= ALIVE_S else Verdict.WAITS


def duplicate_refusal(stage: int) -> Refused:
    text = (
        f"there is already a stage {stage} in this pipeline and it answers: "
        f"give this one another --pipeline-stage-idx, or stop the other"
    )
    return Refused(stage, "--pipeline-stage-idx", "one process per index", str(stage), text)


def range_refusal(earlier: StageIdentity, later: StageIdentity) -> Refused | None:
    """Of the later of two neighbours, when its layers do not begin where the earlier one's end."""
    found = _layers(later)
    problem = check_adjacent(earlier.stage, _layers(earlier), later.stage, found)
    if problem is None:
        return None
    expected = f"a range that starts at {earlier.layer_end}"
    return Refused(later.stage, "--pipeline-layer-range", expected, str(found), problem)


def pipeline_refusal(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """A stage of another pipeline than the head's: another number of stages, another id."""
    return _first_difference(
        other.stage,
        [
            ("--pipeline-total-stages", str(head.num_stages), str(other.num_stages)),
            ("--pipeline-id", head.pipeline_id or "(not set)", other.pipeline_id or "(not set)"),
        ],
    )


def settings_refusal(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """The first thing in which a stage differs from the head; of weights and exports see `folder_refusal`."""
    names = [*head.shared, *(name for name in other.shared if name not in head.shared)]
    names = [name for name in names if name not in _MAY_BE_EMPTY or _is_model_known(name, head, other)]
    pairs = [(name, head.shared.get(name, "(not set)"), other.shared.get(name, "(not set)")) for name in names]
    return pipeline_refusal(head, other) or _first_difference(other.stage, pairs)


def _is_model_known(name: str, head: StageIdentity, other: StageIdentity) -> bool:
    """Of what may be empty, the model is compared with the head's like any other setting, where both know theirs."""
    return name == MODEL_SETTING and all(each.shared.get(name) != "" for each in (head, other))


def folder_refusal(roll: Sequence[StageIdentity], other: StageIdentity) -> Refused | None:
    """A stage whose weights, or whose export, are others than those of the first stage in ``roll`` that knows its own.

    The head may not know, so the head alone is not enough to compare with.
    """
    return _model_refusal(roll, other) or _weights_refusal(roll, other) or _export_refusal(roll, other)


def _model_refusal(roll: Sequence[StageIdentity], other: StageIdentity) -> Refused | None:
    first = _first_to_know(MODEL_SETTING, roll, other)
    if first is None:
        return None
    expected, found = first.shared[MODEL_SETTING], other.shared[MODEL_SETTING]
    text = (
        f"{MODEL_SETTING} is {clip(found)} on stage {other.stage} but {clip(expected)} on stage {first.stage}: all "
        f"stages need the same; start stage {other.stage} with stage {first.stage}'s value"
    )
    return Refused(other.stage, MODEL_SETTING, expected, found, text)


def _weights_refusal(roll: Sequence[StageIdentity], other: StageIdentity) -> Refused | None:
    first = _first_to_know(WEIGHTS_SETTING, roll, other)
    if first is None:
        return None
    expected, found = first.shared[WEIGHTS_SETTING], other.shared[WEIGHTS_SETTING]
    text = (
        f"stage {other.stage} has other weights than stage {first.stage}, under the same names and in the same shapes: "
        f"a sample of their values gives {clip(found)} on stage {other.stage} and {clip(expected)} on stage "
        f"{first.stage}. One folder is a fine-tuned model, or was copied by half: compare `sha256sum` of the weight "
        f"files on both machines, copy the right ones, and start stage {other.stage} again"
    )
    return Refused(other.stage, WEIGHTS_SETTING, expected, found, text)


def _export_refusal(roll: Sequence[StageIdentity], other: StageIdentity) -> Refused | None:
    first = _first_to_know(EXPORT_SETTING, roll, other)
    if first is None:
        return None
    expected, found = first.shared[EXPORT_SETTING], other.shared[EXPORT_SETTING]
    text = (
        f"stage {other.stage}'s folder is of {EXPORT_SETTING} {clip(found)} but stage {first.stage}'s of "
        f"{clip(expected)}: their weights may be of different models; start stage {other.stage} from "
        f"stage_{other.stage} of the same export"
    )
    return Refused(other.stage, EXPORT_SETTING, expected, found, text)


def _first_to_know(setting: str, roll: Sequence[StageIdentity], other: StageIdentity) -> StageIdentity | None:
    """The first stage in ``roll`` with a value, if ``other`` has another one."""
    first = next((identity for identity in roll if identity.shared.get(setting)), None)
    found = other.shared.get(setting)
    return None if first is None or not found or found == first.shared[setting] else first


def _layers(identity: StageIdentity) -> LayerRange:
    return LayerRange(identity.layer_start, identity.layer_end)


def _first_difference(stage: int, pairs: Sequence[tuple[str, str, str]]) -> Refused | None:
    for name, expected, found in pairs:
        if expected != found:
            text = (
                f"{name} is {clip(found)} on stage {stage} but {clip(expected)} on stage 0: "
                f"all stages need the same; start stage {stage} with stage 0's value"
            )
            return Refused(stage, name, expected, found, text)
    return None
