"""What people do to policies, to the chart and to our objects."""

from collections.abc import Iterator
from random import Random

from chaos.fault import Hold, Released, Settled, Stage, fault, some_node
from chaos.site import NAMESPACE, POLICIES_NAMES, Site, policy, until
from wattlock_operator.kube import node_energy_path
from workloads import SYSTEM

_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def _name(rng: Random) -> str:
    return rng.choice(POLICIES_NAMES)


@fault("policy deleted", "policies")
def deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """A policy is deleted: its GPUs are released. Then it comes back."""
    site.delete_policy(_name(rng))
    yield Settled()
    site.apply_policies()


@fault("policy deleted with the operator down", "policies operator", 0.7)
def deleted_without_operator(site: Site, rng: Random) -> Iterator[Stage]:
    """A policy is deleted while no operator runs: its GPUs are released when it is back."""
    with site.operator_down():
        site.delete_policy(_name(rng))
        yield Hold(rng.uniform(0, 4))
    yield Settled()
    site.apply_policies()


@fault("policy switched to Observe", "policies")
def observe(site: Site, rng: Random) -> Iterator[Stage]:
    """A policy is switched to Observe and back."""
    site.patch_policy(_name(rng), {"mode": "Observe"})
    yield Settled()
    site.apply_policies()


@fault("all policies switched to Observe", "policies agents daemonset", 0.7, in_tests=False)
def all_observe(site: Site, rng: Random) -> Iterator[Stage]:
    """Every policy is switched to Observe: agents lose their capability, but not before their locks are undone."""
    for name in POLICIES_NAMES:
        site.patch_policy(name, {"mode": "Observe"})
    yield Settled()
    site.apply_policies()


@fault("pool removed", "policies")
def pool_removed(site: Site, rng: Random) -> Iterator[Stage]:
    """The decode pool is taken out of a policy."""
    name = _name(rng)
    pools = policy(name)["spec"]["pools"]
    site.patch_policy(name, {"pools": [pool for pool in pools if pool["role"] != "Decode"]})
    yield Settled()
    site.apply_policies()


@fault("selector changed", "policies")
def selector_changed(site: Site, rng: Random) -> Iterator[Stage]:
    """The decode pool's selector is changed so that it matches other pods, or none."""
    name = _name(rng)
    pools = policy(name)["spec"]["pools"]
    pools[0]["selector"] = {"matchLabels": {"llm-d.ai/role": "decode", "llm-d.ai/model": "elsewhere"}}
    site.patch_policy(name, {"pools": pools})
    yield Settled()
    site.apply_policies()


@fault("cap changed", "policies", in_tests=False)
def cap_changed(site: Site, rng: Random) -> Iterator[Stage]:
    """Caps are changed, some times in a row."""
    for _ in range(rng.randint(1, 4)):
        site.touch_policies()
        yield Hold(rng.uniform(0, 1.5))
    site.apply_policies()


@fault("NodeEnergy deleted by hand", "nodeenergies")
def node_energy_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """A node's orders are deleted: the operator gives them anew."""
    site.kube.delete(node_energy_path(some_node(site, rng)))
    yield Hold(rng.uniform(0, 2))


@fault("helm uninstall and install", "everything", 0.4, in_tests=False)
def uninstall(site: Site, rng: Random) -> Iterator[Stage]:
    """The chart is uninstalled with policies still there: nothing stays locked. Then it is installed again."""
    site.helm("uninstall", "wattlock", "--wait", "--timeout", "3m")
    yield Released(frozenset(site.nodes), within_seconds=0.0)
    yield Hold(rng.uniform(0, 2))
    site.install()
    site.apply_policies()


@fault("CRDs deleted", "everything", 0.4)
def crds_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """Our kinds are deleted with all their objects: nothing stays locked. Then they come back, and the operator starts
    anew to watch them."""
    for body in site.operators():
        site.allow_restart(body)
    names = ["energypolicies", "nodeenergies", "clockprofiles"]
    rng.shuffle(names)
    for name in names:
        site.kube.delete(f"{_CRDS}/{name}.wattlock.dev")
    yield Released(frozenset(site.nodes))
    until(
        "the kinds are gone", lambda: all(site.kube.get(f"{_CRDS}/{name}.wattlock.dev") is None for name in names), 90
    )
    site.install()
    site.apply_policies()


@fault("workload's namespace deleted", "everything", 0.4)
def namespace_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """The namespace of policies and pods is deleted."""
    site.kube.delete(f"/api/v1/namespaces/{NAMESPACE}")
    yield Released(frozenset(site.nodes))
    until("the namespace is gone", lambda: site.kube.get(f"/api/v1/namespaces/{NAMESPACE}") is None, 120)
    site.deploy()
    site.apply_policies()


@fault("Wattlock's namespace deleted", "everything", 0.3, in_tests=False)
def system_namespace_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """Operator and agents go with their namespace, with nobody to wait for them: agents release as they stop."""
    site.kube.delete(f"/api/v1/namespaces/{SYSTEM}")
    yield Released(frozenset(site.nodes))
    until("the namespace is gone", lambda: site.kube.get(f"/api/v1/namespaces/{SYSTEM}") is None, 120)
    site.install()
    site.apply_policies()
