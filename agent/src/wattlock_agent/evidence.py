"""Whether an instance labelled decode computes prompts itself: then its clock is not ours to lower. Pure."""

from dataclasses import dataclass, replace

WINDOW_SECONDS = 60.0
MAX_COMPUTED_SHARE = 0.10
CLEAR_SECONDS = 300.0
#: A window this much shorter than a minute is still taken for one: scrapes come every 5 s.
_SLACK_SECONDS = 6.0


@dataclass(frozen=True)
class Work:
    """Tokens so far, at a monotonic time."""

    at_seconds: float
    computed_prompt_tokens: float
    generated_tokens: float


@dataclass(frozen=True)
class PromptEvidence:
    """What is known of the instance."""

    recent: tuple[Work, ...] = ()
    """Scrapes of the last minute, of one life of the engine."""
    last_exceeded_seconds: float | None = None
    """When computed prompt tokens were last too large a share of all tokens."""


def add_work(evidence: PromptEvidence, work: Work) -> PromptEvidence:
    """Return the evidence after a scrape."""
    kept = tuple(each for each in evidence.recent if work.at_seconds - each.at_seconds <= WINDOW_SECONDS)
    older = evidence.recent[: len(evidence.recent) - len(kept)]
    if older and _tokens(older[-1]) == _tokens((*kept, work)[0]):
        # Nothing was done in between, so it is as true of a minute ago: a burst after a lull is seen at once.
        kept = (replace(older[-1], at_seconds=work.at_seconds - WINDOW_SECONDS), *kept)
    # While an instance is idle pages come four times a second, all alike: begin and end of a lull say all about it.
    lull = len(kept) > 1 and _tokens(kept[-2]) == _tokens(kept[-1]) == _tokens(work)
    recent = (*(kept[:-1] if lull else kept[-63:]), work)
    evidence = replace(evidence, recent=recent)
    first = recent[0]
    if work.at_seconds - first.at_seconds < WINDOW_SECONDS - _SLACK_SECONDS:
        return evidence
    computed = work.computed_prompt_tokens - first.computed_prompt_tokens
    total = computed + work.generated_tokens - first.generated_tokens
    if total <= 0 or computed / total <= MAX_COMPUTED_SHARE:
        return evidence
    return replace(evidence, last_exceeded_seconds=work.at_seconds)


def _tokens(work: Work) -> tuple[float, float]:
    return work.computed_prompt_tokens, work.generated_tokens


def restarted(evidence: PromptEvidence) -> PromptEvidence:
    """Return the evidence after a restart of the engine: what it did before still counts."""
    return replace(evidence, recent=())


def computes_prompts(evidence: PromptEvidence, now_seconds: float) -> str:
    """Return what it does although its label says decode, as a sentence; empty when it does not."""
    last = evidence.last_exceeded_seconds
    if last is None or now_seconds - last >= CLEAR_SECONDS:
        return ""
    return (
        f"more than {100 * MAX_COMPUTED_SHARE:.0f} % of its tokens in a minute were prompt tokens that it computed "
        "itself: it does prefill, whatever its label says"
    )
