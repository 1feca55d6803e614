"""The operator does its work with the rights that the chart gives it, and nothing is refused to it."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_site import DECODE, PREFILL, SETTLED, TEMPLATE, Site, eventually, placed
from wattlock_operator.kube import connect, profile_path

pytestmark = pytest.mark.cluster

CHART = Path(__file__).parents[2] / "charts" / "wattlock"


@pytest.fixture
def site(kubectl: Any, namespace: str, tmp_path: Path) -> Iterator[Site]:
    """An operator under the chart's own service account, in a release of its own name."""
    release = namespace
    rendered = subprocess.run(
        ["helm", "template", release, str(CHART), "--namespace", namespace, "-s", "templates/operator-rbac.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    objects = [entry for entry in yaml.safe_load_all(rendered) if entry]
    kubectl.run("apply", "-f", "-", stdin=rendered)
    (account,) = [entry["metadata"]["name"] for entry in objects if entry["kind"] == "ServiceAccount"]
    token = kubectl.within(namespace).run("create", "token", account).stdout.strip()
    config = yaml.safe_load(Path(kubectl.kubeconfig).read_text())
    config["users"] = [{"name": "operator", "user": {"token": token}}]
    for context in config["contexts"]:
        context["context"]["user"] = "operator"
    restricted = tmp_path / "kubeconfig"
    restricted.write_text(yaml.safe_dump(config))
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    found = Site(kubectl, namespace, tmp_path, connect(), settings={"KUBECONFIG": str(restricted)})
    found.start()
    yield found
    for agent in found.agents:
        agent.stop()
    found.stop(signal.SIGKILL)
    for node in found.nodes:
        kubectl.run("delete", "node,nodeenergy", node, "--ignore-not-found", "--wait=false", check=False)
    kubectl.run("delete", "-f", "-", "--ignore-not-found", "--wait=false", stdin=rendered, check=False)


def test_a_whole_life_of_a_policy_meets_no_refusal(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.condition("Ready")[0] == "True", 30)
    assert site.policy()["status"]["summary"]["locked"] == 1
    kubectl = site.kubectl.within(site.namespace)
    eventually(lambda: kubectl.get("events", "--field-selector", "reason=InForce")["items"])
    kubectl.run("delete", "energypolicy", "qwen", "--timeout=30s")
    eventually(lambda: kubectl.get("daemonsets")["items"] == [])
    log = site.log.read_text()
    for trouble in ("HTTP 403", "forbidden", "Forbidden", "Traceback", "WARNING", "ERROR"):
        assert trouble not in log, log


def test_a_tuners_result_is_printed_with_the_same_rights(site, good_policy):
    eventually(lambda: site.kube.get(profile_path("published")))
    site.stop()
    tune = {"clock": {"tune": {}}}
    pools = [{**pool, **(tune if pool["role"] == "Decode" else {})} for pool in good_policy["spec"]["pools"]]
    site.kubectl.apply(placed(good_policy, site, pools=pools))
    told = {"name": pools[0]["name"], "role": "Decode", "tuning": SETTLED}
    site.patch_status("energypolicy", "qwen", {"pools": [told]}, site.namespace)
    printed = site.command("profile", f"{site.namespace}/qwen", "--into", "published", "--name", "ours")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert [row["maxSMClockMHz"] for row in yaml.safe_load(printed.stdout)["spec"]["rows"]] == [1590, 705]
