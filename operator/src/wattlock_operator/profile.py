"""``profile``: prints what a pool's tuner found as a ClockProfile, ready for ``kubectl apply -f -``. Reads only."""

import re
from typing import TextIO

from wattlock_api.constants import PUBLISHED_PROFILE

from wattlock_operator import kube as api
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.parse import parse_policy
from wattlock_operator.tunedrow import NoRowError, profile_of, tuned_row

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_MOST_NAME = 253


def run(kube: Kube, policy: str, pool: str, name: str, into: str, out: TextIO, err: TextIO) -> int:
    """Print the profile. Returns 0; 1 with a sentence why there is none; 2 when it was asked wrongly.

    Args:
        kube: where the policy is.
        policy: ``NAMESPACE/NAME``.
        pool: empty: the only one with a tuner.
        name: of the profile; empty: that of ``into``, else made of the policy's.
        into: an existing profile whose other rows are kept; empty: none.
        out: gets the profile and nothing else.
        err: gets all sentences.
    """
    namespace, slash, short = policy.partition("/")
    if not (slash and namespace and short) or "/" in short:
        err.write(f"wattlock-operator: {policy!r} is no policy: write NAMESPACE/POLICY, e.g. llm/qwen\n")
        return 2
    name = name or into or f"{namespace}-{short}"[:_MOST_NAME].rstrip("-.")
    if len(name) > _MOST_NAME or not _NAME.fullmatch(name):
        err.write(f"wattlock-operator: {name!r} is no name for a ClockProfile: write lower-case letters, digits, -\n")
        return 2
    if name == PUBLISHED_PROFILE:
        err.write(f"wattlock-operator: {name!r} holds what is published: give your own profile a name by --name\n")
        return 2
    try:
        text, notes = _profile(kube, (namespace, short), pool, name, into)
    except (NoRowError, KubeError) as error:
        err.write(f"wattlock-operator: {error}\n")
        return 1
    err.write(notes)
    out.write(text)
    out.flush()
    return 0


def _profile(kube: Kube, policy: tuple[str, str], pool: str, name: str, into: str) -> tuple[str, str]:
    """Return the profile, and what is to be said beside it."""
    body = kube.get(api.policy_path(*policy))
    if body is None:
        raise NoRowError(f"there is no policy {'/'.join(policy)}: kubectl get energypolicies -A lists them")
    row = tuned_row(parse_policy(body), pool)
    existing = None
    if into:
        existing = kube.get(api.profile_path(into))
        if existing is None:
            raise NoRowError(f"there is no ClockProfile {into} to write into: leave --into out, or name another")
    text, replaced = profile_of(name, row, existing)
    notes = f"wattlock-operator: replaces row(s) {', '.join(map(str, replaced))} of {into}\n" if replaced else ""
    return text, notes
