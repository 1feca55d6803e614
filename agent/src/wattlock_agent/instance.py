"""One serving instance on this node: its scrapes, its work, its experiment, and what holds it released. Pure."""

import logging
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from wattlock_api.base import decimal_string
from wattlock_api.constants import GpuState, Mode, Reason, Role
from wattlock_api.energypolicy import Guardrail
from wattlock_api.nodeenergy import InstanceStatus, Order
from wattlock_api.peerpower import PeerPowers

from wattlock_agent import evidence, guardrail, idle, prefill
from wattlock_agent.clock import Clock
from wattlock_agent.epochs import SCRAPE_SECONDS
from wattlock_agent.experiment import Switchback
from wattlock_agent.orders import InstanceKey
from wattlock_agent.pagelog import PageLog
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters, is_restart
from wattlock_agent.span import Span
from wattlock_agent.track import GpuTrack
from wattlock_agent.world import Decision, Refusal

_log = logging.getLogger(__name__)

#: A page that took longer tells counters of an unknown time: not used by the experiment.
MAX_TOOK_SECONDS = 1.0
#: How long a restart of the engine is shown.
RESTART_SHOWN_SECONDS = 60.0
_NEVER_SECONDS = float("-inf")
#: What is said in mode Observe already, so that pool or engine can be put right before.
_TOLD_BEFORE = (Reason.COMPUTES_PROMPTS, Reason.PREFILL_SHARE, Reason.PREFILL_NOT_TOLD)


class InstanceTrack:
    """What is known of an instance over time."""

    def __init__(
        self,
        key: InstanceKey,
        before: InstanceStatus | None,
        clock: Clock,
        remembered: guardrail.Remembered | None = None,
    ) -> None:
        """``before``: what had been reported of the same instance; ``remembered``: if by this agent, what it knows."""
        self.key = key
        self._orders: tuple[Order, ...] = ()
        self._url: str | None = None
        self._asked = Clock(_NEVER_SECONDS, _NEVER_SECONDS)
        self._in_flight = False
        self._confirm = False
        self._pages = PageLog(clock)
        self._failure: ScrapeFailure | None = None
        self._locked_since_seconds: float | None = None
        self._compared_since_seconds: float | None = None
        """Since when it is released for comparison."""
        self._joules = float(before.energy_joules or 0) if before else 0.0
        self._energy_measured = True
        self._complete = False
        """Whether the GPUs of all its pods on this node are known."""
        self._evidence = evidence.PromptEvidence()
        self._prefill = prefill.PrefillShare()
        self.idle = idle.IdleWatch(clock.now_seconds)
        self._guardrail = guardrail.GuardrailState(trips=before.guardrail_trips if before else 0)
        self._would_trip = guardrail.GuardrailState()
        """The same rule while it is released for comparison."""
        self._restore_trip = before if before and before.guardrail_tripped and remembered is None else None
        self._last_cap_mhz: int | None = None
        """Of the last order that had one."""
        self._last_bounds: Guardrail | None = None
        if remembered is not None:
            self._guardrail = remembered.state
            self._last_cap_mhz, self._last_bounds = remembered.cap_mhz, remembered.bounds
        self.switchback = Switchback(before)
        self.scrape_failures: dict[str, int] = {}
        self._restarted_seconds = _NEVER_SECONDS
        self._unfit = False
        """Whether a report of it could not be made."""

    @property
    def _order(self) -> Order:
        return self._orders[0]

    @property
    def _enforced(self) -> bool:
        return _is_enforced(self._order)

    def follow(self, orders: Sequence[Order], clock: Clock) -> None:
        """Follow these orders (at least one), all of this instance."""
        before = self._orders
        # A group of pods may have both roles: the one that may be capped is what has to be watched.
        self._orders = tuple(
            sorted(orders, key=lambda each: (not _is_enforced(each), each.pod.namespace, each.pod.name))
        )
        order = self._order
        url = next((each.metrics_url for each in self._orders if each.metrics_url), None)
        if url != self._url:
            self._url = url
            self._asked = Clock(_NEVER_SECONDS, _NEVER_SECONDS)
            self._in_flight = False
            self._forget_scrapes()
        if before and before[0].max_prefill_percent != order.max_prefill_percent:
            self._prefill = prefill.PrefillShare()  # it was about another bound
        self._follow_guardrail(order, clock.now_seconds)
        if not self._enforced or order.experiment is None:
            self.switchback.configure(None, order.instance, None)

    def _follow_guardrail(self, order: Order, now_seconds: float) -> None:
        cap_mhz, bounds = order.cap_mhz, order.guardrail
        if self._restore_trip is not None and bounds is not None:
            # When it tripped is not known any more: the whole cool-down begins anew.
            cooldown_seconds = float(bounds.cooldown_seconds)
            self._guardrail = guardrail.GuardrailState(
                tripped_until_seconds=now_seconds + cooldown_seconds,
                cooldown_seconds=cooldown_seconds,
                message=self._restore_trip.guardrail_message,
                trips=self._guardrail.trips,
                withdrawn=self._restore_trip.guardrail_withdrawn,
            )
        self._restore_trip = None
        other_cap = None not in (cap_mhz, self._last_cap_mhz) and cap_mhz != self._last_cap_mhz
        other_bounds = None not in (bounds, self._last_bounds) and bounds != self._last_bounds
        if other_cap or other_bounds:
            # Somebody did something about it: it is tried at once.
            self._guardrail = guardrail.GuardrailState(trips=self._guardrail.trips)
        elif cap_mhz is None:
            self._guardrail = guardrail.without_cap(self._guardrail)
        self._last_cap_mhz = self._last_cap_mhz if cap_mhz is None else cap_mhz
        self._last_bounds = self._last_bounds if bounds is None else bounds

    def take_peers(self, powers: PeerPowers) -> None:
        """Take in what the operator hands on from the instance's other nodes."""
        for power in powers.instances:
            if (power.policy_uid, power.instance) == (self.key.policy_uid, self.key.instance):
                self.switchback.take_peers(power)

    def credit(self, joules: float) -> None:
        """Add the energy of one of its GPUs since the reading before."""
        self._joules += joules

    @property
    def _span(self) -> Span | None:
        span = self._order.span
        if span is None:
            return None
        return Span(frozenset(span.nodes), span.missing_pods, serves=self._url is not None)

    def scrape_wanted(self, clock: Clock) -> str | None:
        """Return the page to be read now, if one is due; the caller then reads it and calls ``scraped``."""
        if self._url is None or self._in_flight or self.seconds_to_scrape(clock) > 0:
            return None
        self._asked, self._in_flight = clock, True
        return self._url

    def seconds_to_scrape(self, clock: Clock) -> float:
        """Return how long it is until the next scrape: at least 0, a minute where there is nothing to read."""
        if self._url is None or self._in_flight:
            return 60.0
        if self._asked.now_seconds == _NEVER_SECONDS:
            return 0.0
        wait_seconds = SCRAPE_SECONDS
        if self.idle.wanted:
            wait_seconds = idle.WATCH_SECONDS
        elif self._confirm:
            wait_seconds = guardrail.CONFIRM_SECONDS
        elif self._enforced and guardrail.watches_windows(self._order.guardrail):
            wait_seconds = guardrail.WATCH_SECONDS
        due_seconds = self._asked.now_seconds + wait_seconds - clock.now_seconds
        due_unix = self.switchback.next_scrape_unix_seconds(self._asked.unix_seconds)
        if due_unix is not None:
            due_seconds = min(due_seconds, due_unix - clock.unix_seconds)
        return max(0.0, due_seconds)

    def scraped(self, url: str, result: ServingCounters | ScrapeFailure, took_seconds: float, clock: Clock) -> bool:
        """Take in a page; returns whether it changed what holds the instance released, or whether it is idle."""
        if url != self._url:
            return False
        self._in_flight = False
        self._confirm = False
        held = self.hold(clock.now_seconds)
        if isinstance(result, ScrapeFailure):
            if self._failure is None or self._failure.reason != result.reason:
                _log.warning("instance=%s %s: %s", self.key.instance, result.reason, result.message)
            self._failure = result
            self.scrape_failures[result.reason] = self.scrape_failures.get(result.reason, 0) + 1
            self.idle.break_off()
            self._prefill = prefill.add_failure(self._prefill)
            return self._changed(held, clock.now_seconds)
        self._failure = None
        before = self._pages.newest
        if before is not None and is_restart(before, result):
            _log.info("instance=%s the engine restarted", self.key.instance)
            self._pages.restarted()
            self._restarted_seconds = clock.now_seconds
            self._evidence = evidence.restarted(self._evidence)
            self._prefill = prefill.forgotten(self._prefill)
            self.idle.break_off()
            before = None
        # While idle pages come often, and the epoch is dropped anyway: an hour of them would fill the memory.
        self._pages.add(result, clock, sharp=took_seconds <= MAX_TOOK_SECONDS and not self.idle.wanted)
        self.idle.see(result)
        self._judge(before, result, clock)
        return self._changed(held, clock.now_seconds)

    def _changed(self, held: Refusal | None, now_seconds: float) -> bool:
        return (self.hold(now_seconds) is None) != (held is None) or self.is_idle(now_seconds) != self.idle.wanted

    def ticked(self, clock: Clock, decisions: Sequence[Decision], tracks: Mapping[str, GpuTrack]) -> None:
        """Note how the instance's GPUs stand at the end of a pass."""
        # The energy of some of its GPUs would look like that of all.
        self._energy_measured = all(track.meter.measured for track in tracks.values())
        held = {decision.order.pod_uid for decision in decisions if decision.order is not None}
        self._complete = held >= {order.pod_uid for order in self._orders}
        # Of pods with two roles those that are never capped say nothing about the cap.
        decisions = [each for each in decisions if each.order is not None and _is_enforced(each.order)] or decisions
        settled = bool(decisions) and all(decision.settled for decision in decisions)
        locked = settled and all(decision.reason == Reason.LOCKED for decision in decisions)
        # A cap that another program keeps undoing is watched by the guardrail while it is there; the epochs of all its
        # GPUs are dropped, those of the control arm too: whose clock that was is not known.
        idle_wanted = any(decision.idle for decision in decisions)
        capped = settled and not idle_wanted and all(decision.in_force for decision in decisions)
        control = settled and all(decision.reason == Reason.CONTROL_EPOCH for decision in decisions)
        if not capped:
            self._locked_since_seconds = None
        elif self._locked_since_seconds is None:
            self._locked_since_seconds = clock.now_seconds
        if not control:
            self._compared_since_seconds = None
        elif self._compared_since_seconds is None:
            self._compared_since_seconds = clock.now_seconds
        requested = [decision.requested_mhz for decision in decisions if decision.requested_mhz is not None]
        if self._enforced and self._order.experiment is not None and requested:
            # The clock that is really asked of the GPUs, so that statistics and requestedMHz go together.
            self.switchback.configure(
                self._order.experiment.experiment(), self._order.instance, min(requested), self._span
            )
        self.idle.note(clock.now_seconds, idle_wanted, idle_wanted and all(each.in_force for each in decisions))
        if self._span is not None and self._url is None:
            self._pages.mark(clock, self.switchback.next_scrape_unix_seconds)
        for sample in self._pages.join(clock.now_seconds, tracks):
            self.switchback.add(sample)
        as_asked = self._complete and (locked or control) and not self.idle.recovers(clock.now_seconds)
        for pair in self.switchback.note(clock, as_asked):
            if self._order.guardrail is not None:
                before = self._guardrail.trips
                self._guardrail = guardrail.judge_pair(self._guardrail, self._order.guardrail, clock.now_seconds, pair)
                self._log_trip(before)

    def is_idle(self, now_seconds: float) -> bool:
        """Return whether it has had no work for as long as its order asks, by a page of now, and may be capped lower.

        Not where pods on other nodes belong to it (their agents see no page), nor while the guardrail holds it.
        """
        if not self._orders or not self._enforced or self._order.idle is None or self._order.span is not None:
            return False
        if guardrail.is_tripped(self._guardrail, now_seconds):
            return False
        return idle.is_idle(self.idle.stillness, self._order.idle.after_seconds, now_seconds)

    def hold(self, now_seconds: float) -> Refusal | None:
        """Return what holds the instance released, if anything does."""
        if not self._orders or not self._enforced:
            return None
        if self._order.guardrail is not None and guardrail.is_tripped(self._guardrail, now_seconds):
            return Refusal(GpuState.RELEASED, Reason.GUARDRAIL, self._guardrail.message)
        return self._prompts(now_seconds)

    def _prompts(self, now_seconds: float) -> Refusal | None:
        """Return, in any mode, what the prompts that it computes say against a cap."""
        order, released = self._order, GpuState.RELEASED
        if order.role is Role.DECODE:
            if not (text := evidence.computes_prompts(self._evidence, now_seconds)):
                return None
            text = f"{text}; released until it has not for {evidence.CLEAR_SECONDS:.0f} s"
            return Refusal(released, Reason.COMPUTES_PROMPTS, text)
        if order.max_prefill_percent is None:
            return None
        if self._url is None:
            text = "no metrics address is known for it, so it is not seen how much it prefills"
            return Refusal(released, Reason.NO_SERVING_METRICS, text)
        if self._failure is not None and self._prefill.failures >= prefill.MAX_FAILURES:
            text = f"it is not seen how much it prefills: {self._failure.message}"
            return Refusal(released, self._failure.reason, text)
        return prefill.objection(self._prefill, now_seconds, order.max_prefill_percent)

    @property
    def remembered(self) -> guardrail.Remembered:
        """What outlives its orders."""
        return guardrail.Remembered(guardrail.without_cap(self._guardrail), self._last_cap_mhz, self._last_bounds)

    @property
    def guardrail_trips(self) -> int:
        """Breaches so far."""
        return self._guardrail.trips

    def status(self, now_seconds: float, without_gpu: Refusal | None) -> InstanceStatus:
        """Return the instance for the report; ``without_gpu``: why one of its pods has no GPU here."""
        try:
            return self._status(now_seconds, without_gpu)
        except ValidationError as error:
            # The pages are bounded, and so are the numbers made of them. Should one slip through all the same, it must
            # not stop an agent that has other people's GPUs to undo.
            if not self._unfit:
                _log.error("instance=%s its numbers do not fit into a report: %.500s", self.key.instance, error)
            self._unfit = True
            text = "what its metrics say does not fit into a report: nothing is told of it until the agent is restarted"
            return InstanceStatus(
                key=self.key.text,
                policy_uid=self.key.policy_uid,
                pool=self._order.pool,
                instance=self.key.instance,
                reason=Reason.METRICS_INVALID,
                message=text,
            )

    def _status(self, now_seconds: float, without_gpu: Refusal | None) -> InstanceStatus:
        order = self._order
        reason, message = "", ""
        if without_gpu is not None:
            reason, message = without_gpu.reason, without_gpu.message
        elif self._url is None and order.span is None:
            reason = Reason.NO_SERVING_METRICS
            message = (
                "no metrics address is known for its pods on this node: the reasons of the policy's pool tell more"
            )
        elif self._failure is not None:
            reason, message = self._failure.reason, self._failure.message
        elif now_seconds - self._restarted_seconds < RESTART_SHOWN_SECONDS:
            reason = Reason.COUNTERS_RESTARTED
            message = "its counters went back within the last minute: the engine restarted, or the page is wrong"
        prompts = self._prompts(now_seconds)
        if prompts is not None and not reason and not self._enforced and prompts.reason in _TOLD_BEFORE:
            # Said before anybody enforces; once enforced, the GPU's own reason says it.
            reason, message = prompts.reason, f"it would not be capped in mode Enforce: {prompts.message}"
        if not reason and (never := idle.why_never(order, self.idle.stillness)):
            reason, message = Reason.IDLE_NOT_TOLD, never
        # Told without a cap as well: who gives the next one must know that the cool-down runs.
        tripped = order.guardrail is not None and guardrail.is_tripped(self._guardrail, now_seconds)
        return InstanceStatus(
            key=self.key.text,
            policy_uid=self.key.policy_uid,
            pool=order.pool,
            instance=self.key.instance,
            reason=reason,
            message=message[:1000],
            computes_prompts=prompts is not None and prompts.reason in (Reason.COMPUTES_PROMPTS, Reason.PREFILL_SHARE),
            guardrail_tripped=tripped,
            guardrail_message=self._guardrail.message if tripped else "",
            guardrail_withdrawn=tripped and self._guardrail.withdrawn,
            guardrail_trips=self._guardrail.trips,
            energy_joules=decimal_string(self._joules, 1) if self._energy_measured else None,
            arms=self.switchback.arms(),
            pair_stats=self.switchback.pair_stats(),
            dropped=self.switchback.dropped(),
            epochs=self.switchback.epochs(),
        ).model_copy(update=self._pages.rates(order, self._complete, now_seconds))

    def _judge(self, before: ServingCounters | None, result: ServingCounters, clock: Clock) -> None:
        if result.computed_prompt_tokens is not None and result.generated_tokens is not None:
            work = evidence.Work(result.at_seconds, result.computed_prompt_tokens, result.generated_tokens)
            self._evidence = evidence.add_work(self._evidence, work)
        if self._order.max_prefill_percent is not None:
            self._prefill = prefill.add_page(self._prefill, result, self._order.max_prefill_percent)
        bounds = self._order.guardrail
        if before is None or bounds is None or not self._enforced:
            return
        began = before.at_seconds
        locked = self._locked_since_seconds is not None and self._locked_since_seconds <= began
        compared = self._compared_since_seconds is not None and self._compared_since_seconds <= began
        if not (locked or compared):
            return  # not so through the whole window: what was slow is not known to be our doing
        seen = guardrail.window(before, result)
        if compared:
            # What would release a capped instance and so drop its epoch must drop a released one too.
            trips = self._would_trip.trips
            self._would_trip = guardrail.judge_window(self._would_trip, bounds, clock.now_seconds, seen)
            self._confirm = self._would_trip.suspicious
            if self._would_trip.trips != trips:
                self._would_trip = guardrail.GuardrailState()
                self.switchback.spoil(result.at_seconds + clock.offset_seconds)
            return
        trips = self._guardrail.trips
        self._guardrail = guardrail.judge_window(self._guardrail, bounds, clock.now_seconds, seen)
        self._confirm = self._guardrail.suspicious
        self._log_trip(trips)

    def _log_trip(self, trips_before: int) -> None:
        if self._guardrail.trips != trips_before:
            _log.warning("instance=%s guardrail: %s", self.key.instance, self._guardrail.message)

    def _forget_scrapes(self) -> None:
        self._pages.forget()
        self._failure = None
        self._evidence = evidence.restarted(self._evidence)
        self._prefill = prefill.PrefillShare()
        self.idle.stillness = idle.Stillness()


def _is_enforced(order: Order) -> bool:
    return order.mode is Mode.ENFORCE and order.may_be_capped and order.cap_mhz is not None
