"""How much of its work an instance of a Mixed pool spends on prompts: with too much of it, its clock is not ours. Pure.

The share is computed prompt tokens of all tokens (computed prompt and generated ones) over the last half minute. Every
token passes the same weights, so it is about the share of floating-point work; of the time it is much less.

| state | goes to | when |
| --- | --- | --- |
| unknown | within its bound | pages of a minute, with some work on them, showed no larger share |
| within its bound | too much | the first page with a larger share over the window |
| within its bound | unknown | the engine restarted, two pages in a row could not be read, or none came for 15 s |
| too much | within its bound | no page of a minute showed a larger share |

Only within its bound an instance is capped. All of it is judged in capped and in released epochs alike.
"""

from dataclasses import dataclass, replace

from wattlock_api.constants import GpuState, Reason

from wattlock_agent.evidence import Work
from wattlock_agent.serving.base import ServingCounters
from wattlock_agent.world import Refusal

WINDOW_SECONDS = 30.0
CLEAR_SECONDS = 60.0
MAX_FAILURES = 2
#: Three ordinary scrapes: without a page for so long nothing is known.
MAX_AGE_SECONDS = 15.0
_MAX_PAGES = 63


@dataclass(frozen=True)
class PrefillShare:
    """What is known of an instance. Times are monotonic seconds."""

    recent: tuple[Work, ...] = ()
    """Pages of the window, of one life of the engine."""
    within_since_seconds: float | None = None
    """Since when no page showed too large a share; ``None``: the newest did, or nothing is known."""
    too_much: bool = False
    """Whether the last page that told a share told too large a one, until it has cleared."""
    told: bool = True
    """Whether the newest page tells computed prompt tokens apart."""
    failures: int = 0
    """Pages in a row that could not be read."""


def add_page(share: PrefillShare, page: ServingCounters, max_percent: float) -> PrefillShare:
    """Return what is known after a page that could be read."""
    if page.computed_prompt_tokens is None or page.generated_tokens is None:
        return PrefillShare(told=False)
    work = Work(page.at_seconds, page.computed_prompt_tokens, page.generated_tokens)
    kept = tuple(each for each in share.recent if work.at_seconds - each.at_seconds <= WINDOW_SECONDS)
    recent = (*kept[-_MAX_PAGES:], work)
    share = replace(share, recent=recent, told=True, failures=0)
    computed = work.computed_prompt_tokens - recent[0].computed_prompt_tokens
    total = computed + work.generated_tokens - recent[0].generated_tokens
    if 100 * computed > max_percent * total:
        return replace(share, within_since_seconds=None, too_much=True)
    if total <= 0 or share.within_since_seconds is not None:  # a lull is no prefill, and no sign of little of it
        return share
    return replace(share, within_since_seconds=work.at_seconds)


def add_failure(share: PrefillShare) -> PrefillShare:
    """Return what is known after a page that could not be read."""
    share = replace(share, failures=share.failures + 1)
    return share if share.failures < MAX_FAILURES else forgotten(share)


def forgotten(share: PrefillShare) -> PrefillShare:
    """Return what is left when counters begin anew or were not seen for too long: nothing but the failures."""
    return PrefillShare(failures=share.failures, told=share.told)


def objection(share: PrefillShare, now_seconds: float, max_percent: float) -> Refusal | None:
    """Return why the instance is not to be capped, if so."""
    if not share.told:
        return Refusal(
            GpuState.RELEASED,
            Reason.PREFILL_NOT_TOLD,
            "its metrics do not tell which prompt tokens it computes itself, so it is not known how much prefill a cap "
            "would slow: use a version of the engine that tells (vllm:prompt_tokens_by_source_total, "
            "sglang:realtime_tokens_total), or remove the pool's clock",
        )
    since = share.within_since_seconds
    fresh = bool(share.recent) and now_seconds - share.recent[-1].at_seconds <= MAX_AGE_SECONDS
    if since is not None and fresh and now_seconds - since >= CLEAR_SECONDS:
        return None
    if share.too_much:
        return Refusal(
            GpuState.RELEASED,
            Reason.PREFILL_SHARE,
            f"more than {max_percent:g} % of its tokens were prompt tokens that it computed: released until that has "
            f"not been so for {CLEAR_SECONDS:.0f} s",
        )
    return Refusal(
        GpuState.RELEASED,
        Reason.PREFILL_UNKNOWN,
        f"how much of its work is prefill is not known for {CLEAR_SECONDS:.0f} s yet: it is capped when its metrics "
        f"have shown at most {max_percent:g} % for so long",
    )
