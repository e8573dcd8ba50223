# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the workers' weight states add up to for the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.model_executor.model_loader.reload import ReloadStatus

__all__ = ["EngineWeightState"]


@dataclass(frozen=True)
class EngineWeightState:
    """The weights of an engine, as its workers reported them last.

    Attributes:
        versions: complete syncs so far on each rank.
        mixture: why a rank's own weights must not be served; None if they may.
        split: which ranks' weights do not belong together; None if all do.
        updating: whether a sync is open on any rank.
        lost: why a rank has no whole weights; None if all have. They may be served all
            the same, such as dummy weights.

    """

    versions: tuple[int, ...] = ()
    mixture: str | None = None
    split: str | None = None
    updating: bool = False
    lost: str | None = None

    @property
    def reason(self) -> str | None:
        """Why these weights must not be served; None if they may."""
        return self.mixture or self.split

    def after(self, states: Sequence[tuple[ReloadStatus, ...]]) -> "EngineWeightState":
        """Return the state after an RPC.

        Args:
            states: for each rank the states of its models, the served one first.

        """
        versions = tuple(models[0].version for models in states if models)
        return EngineWeightState(
            versions,
            _mixture(states),
            self._split_after(versions),
            any(state.state == "updating" for models in states for state in models),
            _lost(states),
        )

    def committed_since(self, earlier: "EngineWeightState") -> bool:
        """Whether new weights are in service on any rank."""
        return any(earlier._moved(self.versions))

    def _moved(self, versions: tuple[int, ...]) -> list[bool]:
        """Tell for each rank whether its version has changed."""
        before = self.versions or (0,) * len(versions)
        return [new != old for new, old in zip(versions, before, strict=True)]

    def _split_after(self, versions: tuple[int, ...]) -> str | None:
        """Tell whether one RPC committed weights on some ranks only.

        Versions are not compared between ranks: they stay apart after such an RPC, and
        a later sync that succeeds on every rank mends it.
        """
        committed = self._moved(versions)
        if all(committed):
            return None
        if not any(committed):
            return self.split
        behind = [str(rank) for rank, moved in enumerate(committed) if not moved]
        return (
            f"new weights were committed on {sum(committed)} of {len(committed)} ranks,"
            f" but not on rank {', '.join(behind)}"
        )


def _lost(states: Sequence[tuple[ReloadStatus, ...]]) -> str | None:
    inconsistent = (s for models in states for s in models if s.state == "inconsistent")
    return next((state.detail for state in inconsistent), None)


def _mixture(states: Sequence[tuple[ReloadStatus, ...]]) -> str | None:
    for rank, models in enumerate(states):
        for state in models:
            if state.fenced:
                place = f"rank {rank}: " if len(states) > 1 else ""
                return f"{place}{state.detail}"
    return None
