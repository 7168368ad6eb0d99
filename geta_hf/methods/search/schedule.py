"""The three stages of a search as integers: which step belongs to which."""

from __future__ import annotations

from dataclasses import dataclass

from geta_hf.errors import GETAError
from geta_hf.methods.qasso.schedule import resolve_duration
from geta_hf.methods.search.config import SearchConfig

WARMUP, SEARCH, FINETUNING = "warm-up", "search", "fine-tuning"
STAGES = (WARMUP, SEARCH, FINETUNING)


@dataclass(frozen=True)
class SearchSchedule:
    """Steps of warm-up and of the search; fine-tuning takes the rest of `total`."""

    warmup: int
    search: int
    total: int

    @classmethod
    def of(cls, config: SearchConfig, total_steps: int, steps_per_epoch: float) -> SearchSchedule:
        """Resolve the stages of a config. Raise GETAError where they do not fit into training."""
        warmup = resolve_duration(config.warmup, total_steps, steps_per_epoch, "SearchConfig.warmup")
        search = resolve_duration(config.search, total_steps, steps_per_epoch, "SearchConfig.search")
        if search < 1:
            raise GETAError(
                f"SearchConfig.search = {config.search!r} is no step of {total_steps}: search for one step or more"
            )
        if warmup + search > total_steps:
            raise GETAError(
                f"warm-up takes {warmup} steps and the search {search}, but training has {total_steps}; shorten them"
            )
        return cls(warmup, search, total_steps)

    @property
    def decided_after(self) -> int:
        """The number of steps after which choices are fixed."""
        return self.warmup + self.search

    def stage(self, step: int) -> str:
        """Return the stage of a 0-based step."""
        if step < self.warmup:
            return WARMUP
        return SEARCH if step < self.decided_after else FINETUNING
