"""What the chart renders, over a matrix of values."""

import re

import pytest
import yaml
from rendered import agent_template, environment, kinds, named, pods, strings
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Placement
from wattlock_operator.placement import daemon_set
from wattlock_operator.settings import from_environment
from wattlock_operator.sharing import Shared

pytestmark = [pytest.mark.chart]

MATRIX: dict[str, tuple[str, ...]] = {
    "default": (),
    "simulator": ("simulator.enabled=true", "simulator.gpusPerNode=4", "simulator.product=H100"),
    "driver on the host": ("agent.driver.mode=hostPath",),
    "no crds": ("crds.install=false",),
    "crds not kept": ("crds.keep=false",),
    "no admission": ("admission.enabled=false",),
    "pod monitors": ("metrics.podMonitor.enabled=true", "metrics.podMonitor.labels.release=prometheus"),
    "agents apart": ("agent.namespace=gpu-agents", "metrics.podMonitor.enabled=true"),
    "no hook": ("hooks.preDelete.enabled=false",),
    "two operators": ("operator.replicas=2",),
    "network policies": ("networkPolicy.enabled=true", "agent.namespace=gpu-agents"),
    "everything set": (
        "image.registry=registry.example/team",
        "image.tag=dev",
        "image.pullSecrets[0].name=pull",
        "operator.image.digest=sha256:" + 64 * "a",
        "operator.tolerations[0].operator=Exists",
        "operator.priorityClassName=high",
        "operator.podLabels.team=serving",
        "operator.extraEnv[0].name=N",
        "operator.extraEnv[0].value=on",
        "agent.priorityClassName=system-node-critical",
        "agent.podAnnotations.note=yes",
        "agent.podLabels.team=serving",
        "agent.extraEnv[0].name=Y",
        "agent.extraEnv[0].value=off",
        "metrics.scrapeAnnotations=false",
        "rbac.aggregate=false",
    ),
}
every_case = pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.replace(" ", "-"))


def test_helm_lint_has_nothing_to_say(helm):
    result = helm.run("lint", "--strict", str(helm.chart))
    assert "1 chart(s) linted, 0 chart(s) failed" in result.stdout
    assert "[WARNING]" not in result.stdout


@every_case
def test_no_role_has_a_wildcard(helm, case):
    for role in [o for o in helm.render(*MATRIX[case]) if o["kind"] in ("Role", "ClusterRole")]:
        for rule in role["rules"]:
            assert not {"*"} & {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}, role["metadata"]["name"]
            assert not {"secrets", "pods/exec", "nodes/proxy", "impersonate", "escalate", "bind"} & {
                *rule["resources"],
                *rule["verbs"],
            }


@every_case
def test_every_container_is_confined(helm, case):
    running = pods(helm.render(*MATRIX[case]))
    assert {"operator", "agent", "check"} <= set(running)
    for component, pod in running.items():
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), component
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, component
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}, component
            assert context["allowPrivilegeEscalation"] is False, component
            assert context["readOnlyRootFilesystem"] is True, component
            assert not context.get("privileged"), component
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), component
            assert "memory" in container["resources"]["limits"], component


@every_case
def test_what_needs_nothing_of_its_node_fits_pod_security_restricted(helm, case):
    for component, pod in pods(helm.render(*MATRIX[case])).items():
        if component in ("agent", "simulator"):
            continue
        assert pod["securityContext"]["runAsNonRoot"] is True, component
        assert pod["securityContext"]["runAsUser"] == 65532, component
        # of the kinds of volumes that "restricted" allows, these are all that we use
        assert all(set(volume) <= {"name", "configMap", "emptyDir"} for volume in pod["volumes"]), component


@every_case
def test_only_what_talks_to_the_api_server_has_a_token(helm, case):
    objects = helm.render(*MATRIX[case])
    for account in kinds(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for component, pod in pods(objects).items():
        assert pod["automountServiceAccountToken"] is (component != "simulator"), component


@every_case
def test_text_stays_text(helm, case):
    objects = helm.render(*MATRIX[case])
    for o in [*objects, agent_template(objects)]:
        # a schema is no object: its "labels" are descriptions of labels
        strings(o["metadata"] if o["kind"] == "CustomResourceDefinition" else o, o["metadata"]["name"])


@every_case
def test_the_notes_render(helm, case):
    result = helm.run(
        *("install", "wattlock", str(helm.chart), "--namespace", "n", "--dry-run=client"),
        *(word for pair in MATRIX[case] for word in ("--set", pair)),
    )
    notes = result.stdout.split("NOTES:", 1)[1]
    assert "charts/wattlock/examples/llm-d-observe.yaml" in notes
    assert ("WARNING: SIMULATED GPUs" in notes) == (case == "simulator")
    assert ("admission.enabled is false" in notes) == (case == "no admission")
    assert ("hooks.preDelete.enabled is false" in notes) == (case == "no hook")


def test_operators_may_be_several_and_survive_a_node(helm):
    one, two = helm.render(), helm.render("operator.replicas=2")
    deployment = named(one, "Deployment", "wattlock-operator")
    assert deployment["spec"]["replicas"] == 1
    assert "topologySpreadConstraints" not in deployment["spec"]["template"]["spec"]
    assert not kinds(one, "PodDisruptionBudget"), "it would keep a node with the only pod from being drained"

    deployment = named(two, "Deployment", "wattlock-operator")
    assert deployment["spec"]["replicas"] == 2
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    budget = named(two, "PodDisruptionBudget", "wattlock-operator")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    for selector in (spread["labelSelector"], budget["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
        assert selector == deployment["spec"]["selector"]


def test_the_operator_knows_its_surroundings(helm):
    objects = helm.render("agent.namespace=gpu-agents")
    deployment = named(objects, "Deployment", "wattlock-operator")
    # The lease keeps two from leading at once, so the next one may be there before the last one goes.
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    known = environment(container)
    assert container["args"] == ["run"]
    assert known["WATTLOCK_AGENT_NAMESPACE"] == "gpu-agents"
    assert known["WATTLOCK_HTTP_PORT"] == "8080"
    assert known["LOGNAME"] == "wattlock"
    assert {"WATTLOCK_NAMESPACE", "POD_NAME"} <= set(known)
    assert container["ports"] == [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    mount = next(m for m in container["volumeMounts"] if m["name"] == "agent-template")
    key = known["WATTLOCK_AGENT_TEMPLATE"].removeprefix(mount["mountPath"] + "/")
    assert key in named(objects, "ConfigMap", "wattlock-agent-template")["data"]


def test_namespaces_with_pods_on_their_nodes_network_are_told_to_the_operator(helm):
    variable = "WATTLOCK_HOST_NETWORK_NAMESPACES"
    for sets, expected in ((("metrics.hostNetworkNamespaces={llm,rdma}",), "llm,rdma"), ((), None)):
        (container,) = pods(helm.render(*sets))["operator"]["containers"]
        assert environment(container).get(variable) == expected


def test_a_changed_agent_template_restarts_the_operator(helm):
    def checksum(*sets: str) -> str:
        deployment = named(helm.render(*sets), "Deployment", "wattlock-operator")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/agent-template"]

    assert checksum() == checksum()
    assert checksum() != checksum("agent.image.repository=other")


def test_the_agent_template_leaves_to_the_operator_what_a_policy_decides(helm):
    spec = agent_template(helm.render())["spec"]
    pod = spec["template"]["spec"]
    assert not {"nodeSelector", "tolerations", "runtimeClassName"} & set(pod)
    (container,) = pod["containers"]
    assert "WATTLOCK_MODE" not in environment(container)
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_the_agent_template_is_what_the_agent_expects(helm):
    objects = helm.render("agent.namespace=gpu-agents", "agent.stateDirectory=/data/wattlock")
    daemonset = agent_template(objects)
    assert daemonset["metadata"]["namespace"] == "gpu-agents"
    assert daemonset["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": "100%"}
    pod = daemonset["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 30
    assert pod["securityContext"]["runAsUser"] == 0
    named(objects, "ServiceAccount", pod["serviceAccountName"])
    (container,) = pod["containers"]
    assert (container["name"], container["args"]) == ("agent", ["run"])
    known = environment(container)
    assert known["WATTLOCK_NAMESPACE"] == "wattlock-system"
    assert known["WATTLOCK_STATE_DIR"] == "/var/lib/wattlock"
    assert known["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert known["NVIDIA_DRIVER_CAPABILITIES"] == "utility"
    assert {"NODE_NAME", "POD_NAME"} <= set(known)
    assert container["ports"] == [{"name": "metrics", "containerPort": 9400, "protocol": "TCP"}]
    volumes = {volume["name"]: volume["hostPath"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert volumes["state"] == {"path": "/data/wattlock", "type": "DirectoryOrCreate"}
    assert "readOnly" not in mounts["state"]
    assert volumes["pod-resources"]["path"] == "/var/lib/kubelet/pod-resources"
    assert mounts["pod-resources"]["readOnly"] is True
    assert set(volumes) == {"state", "pod-resources"}


def test_agents_are_told_how_long_they_may_follow_old_orders(helm):
    def told(*sets):
        (container,) = agent_template(helm.render(*sets))["spec"]["template"]["spec"]["containers"]
        return environment(container)["WATTLOCK_STALE_ORDERS_SECONDS"]

    assert told() == "600"
    assert told("agent.staleOrdersSeconds=90") == "90"


def test_only_simulated_nodes_have_boots_of_their_own(helm):
    def known(*sets):
        (container,) = agent_template(helm.render(*sets))["spec"]["template"]["spec"]["containers"]
        return environment(container)

    assert "WATTLOCK_BOOT_ID_FILE" not in known()
    assert known("simulator.enabled=true")["WATTLOCK_BOOT_ID_FILE"] == "/var/lib/wattlock-simulator/boot_id"


def test_a_node_is_reset_by_a_job_made_like_the_agents(helm):
    assert kinds(helm.render("hooks.preDelete.enabled=false"), "Job") == []
    sets = ("reset.node=gpu-7.example", "agent.namespace=gpu-agents", "agent.stateDirectory=/data/wattlock")
    objects = helm.render("hooks.preDelete.enabled=false", "reset.runtimeClassName=nvidia", *sets)
    (job,) = kinds(objects, "Job")
    assert job["metadata"]["namespace"] == "gpu-agents"
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeName"] == "gpu-7.example"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["tolerations"] == [{"operator": "Exists"}], "it must run there whatever is wrong with the node"
    assert pod["automountServiceAccountToken"] is False
    assert not {"serviceAccountName", "affinity"} & set(pod)
    (container,) = pod["containers"]
    agent = agent_template(objects)["spec"]["template"]["spec"]
    assert container["args"] == ["reset"]
    assert not {"ports", "livenessProbe", "readinessProbe"} & set(container)
    assert container["image"] == agent["containers"][0]["image"]
    assert environment(container) == environment(agent["containers"][0])
    assert container["volumeMounts"] == agent["containers"][0]["volumeMounts"]
    assert pod["volumes"] == agent["volumes"]
    security = agent["containers"][0]["securityContext"]
    assert container["securityContext"] == security | {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}


def test_long_names_of_nodes_give_different_jobs(helm):
    def name(node):
        (job,) = kinds(helm.render("hooks.preDelete.enabled=false", f"reset.node={node}"), "Job")
        return job["metadata"]["name"]

    names = {name("n" * 80 + end) for end in ("a", "b")} | {name("n" * 36 + "." + end) for end in ("a", "b")}
    assert len(names) == 4
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", each) and len(each) <= 63 for each in names)
    assert not any(".-" in each for each in names), "a part between dots may not begin with a dash"


def test_the_agent_leaves_a_node_whose_driver_is_replaced(helm):
    pod = agent_template(helm.render())["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    key = "nvidia.com/gpu.deploy.client"
    # terms are alternatives: no such label, or "true"; "paused-for-driver-upgrade" fits neither
    assert [term["matchExpressions"] for term in terms] == [
        [{"key": key, "operator": "DoesNotExist"}],
        [{"key": key, "operator": "In", "values": ["true"]}],
    ]


def test_a_driver_on_the_host_is_mounted_to_read(helm):
    pod = agent_template(helm.render("agent.driver.mode=hostPath"))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert environment(container)["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(container)
    assert {"name": "driver", "mountPath": "/usr/local/nvidia", "readOnly": True} in container["volumeMounts"]
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "driver")
    assert volume["hostPath"] == {"path": "/home/kubernetes/bin/nvidia", "type": "Directory"}


def test_the_simulator_takes_the_place_of_the_driver(helm):
    objects = helm.render(*MATRIX["simulator"])
    daemonset = named(objects, "DaemonSet", "wattlock-simulator")
    (simulator,) = daemonset["spec"]["template"]["spec"]["containers"]
    folder = "/var/lib/wattlock-simulator"
    assert simulator["args"] == ["node", "--directory", folder, "--gpus", "4", "--product", "H100"]
    pod = agent_template(objects)["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    assert environment(agent)["LD_LIBRARY_PATH"] == folder
    assert {"name": "driver", "mountPath": folder, "readOnly": False} in agent["volumeMounts"]
    for spec in (pod, daemonset["spec"]["template"]["spec"]):
        driver = next(volume for volume in spec["volumes"] if volume["name"] == "driver")
        assert driver["hostPath"]["path"] == folder


def test_the_simulator_keeps_away_from_real_gpus(helm):
    assert kinds(helm.render(), "DaemonSet") == []
    daemonset = named(helm.render("simulator.enabled=true"), "DaemonSet", "wattlock-simulator")
    affinity = daemonset["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "nvidia.com/gpu.product", "operator": "DoesNotExist"} in term["matchExpressions"]


def test_crds_are_installed_and_kept_as_asked(helm):
    def annotations(*sets: str) -> list[dict[str, str]]:
        crds = kinds(helm.render(*sets), "CustomResourceDefinition")
        return [crd["metadata"].get("annotations", {}) for crd in crds]

    assert annotations() == [{"helm.sh/resource-policy": "keep"}] * 3
    assert annotations("crds.keep=false") == [{}] * 3
    assert annotations("crds.install=false") == []


def test_the_release_hook_has_its_rights_before_it_runs(helm):
    hooks = [
        o
        for o in helm.render("hooks.preDelete.timeoutSeconds=120")
        if o["metadata"].get("annotations", {}).get("helm.sh/hook") == "pre-delete"
    ]
    weights = {o["kind"]: int(o["metadata"]["annotations"]["helm.sh/hook-weight"]) for o in hooks}
    assert all(weight < weights["Job"] for kind, weight in weights.items() if kind != "Job")
    assert {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Job"} == set(weights)
    for o in hooks:
        assert o["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    (job,) = kinds(hooks, "Job")
    assert job["spec"]["activeDeadlineSeconds"] == 120
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["release-all"]
    assert environment(container)["WATTLOCK_RELEASE_TIMEOUT_SECONDS"] == "90"
    named(hooks, "ServiceAccount", job["spec"]["template"]["spec"]["serviceAccountName"])


@pytest.mark.parametrize("release", ["w", "wattlock", "a" * 53, "prod-wattlock-" + "b" * 39])
def test_names_fit_and_differ_however_long_the_release_is_called(helm, release):
    objects = helm.render("simulator.enabled=true", release=release)
    names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)
    for o in objects:
        assert len(o["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in o["metadata"].get("labels", {}).values())


def test_images_come_from_the_registry_that_was_named(helm):
    running = pods(helm.render(*MATRIX["everything set"], "simulator.enabled=true"))
    images = {component: pod["containers"][0]["image"] for component, pod in running.items()}
    at_digest = "registry.example/team/wattlock-operator@sha256:" + 64 * "a"
    assert images == {
        "operator": at_digest,
        "release-hook": at_digest,
        "check": at_digest,
        "agent": "registry.example/team/wattlock-agent:dev",
        "simulator": "registry.example/team/wattlock-simulator:dev",
    }
    assert all(pod["imagePullSecrets"] == [{"name": "pull"}] for pod in running.values())


@pytest.mark.parametrize("sets", [(), ("nameOverride=other",), ("fullnameOverride=other",)])
def test_labels_by_which_the_operator_finds_its_agents_never_change(helm, sets):
    # placement.py of the operator selects by them, and the PodMonitor does
    labels = agent_template(helm.render(*sets), f"{agent_name(sets)}-template")["spec"]["template"]["metadata"][
        "labels"
    ]
    assert labels["app.kubernetes.io/name"] == "wattlock"
    assert labels["app.kubernetes.io/component"] == "agent"


def agent_name(sets: tuple[str, ...]) -> str:
    return {"nameOverride": "wattlock-other-agent", "fullnameOverride": "other-agent"}.get(
        sets[0].split("=")[0] if sets else "", "wattlock-agent"
    )


def test_the_operator_makes_its_daemonset_of_the_template(helm):
    made = daemon_set(agent_template(helm.render()), Shared((Placement(),), Mode.ENFORCE), "wattlock-system")
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert environment(container)["WATTLOCK_MODE"] == "Enforce"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    assert "nodeAffinity" in pod["affinity"]
    assert made["spec"]["selector"]["matchLabels"].items() <= made["spec"]["template"]["metadata"]["labels"].items()
    observing = daemon_set(agent_template(helm.render()), Shared((Placement(),), Mode.OBSERVE), "wattlock-system")
    (container,) = observing["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_administrators_limits_reach_the_operator_and_not_the_release_hook(helm):
    limit = "agent.allowedPlacements[0]."
    found = helm.render(limit + "runtimeClassName=nvidia", limit + "nodeSelector.gpu=h200")
    (container,) = named(found, "Deployment", "wattlock-operator")["spec"]["template"]["spec"]["containers"]
    limits = from_environment(environment(container) | {"WATTLOCK_NAMESPACE": "w"}).allowed_placements
    assert limits == (Placement(runtime_class_name="nvidia", node_selector={"gpu": "h200"}),)
    # the hook must release everything also where they cannot be used
    assert yaml.safe_dump_all(found).count("WATTLOCK_ALLOWED_PLACEMENTS") == 1
    assert "WATTLOCK_ALLOWED_PLACEMENTS" not in yaml.safe_dump_all(helm.render())


@pytest.mark.parametrize("mode", Mode)
def test_an_agent_is_confined_in_every_mode(helm, mode):
    pod = daemon_set(agent_template(helm.render()), Shared((Placement(),), mode), "wattlock-system")["spec"][
        "template"
    ]["spec"]
    assert pod["securityContext"] == {"runAsUser": 0, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}}
    assert {pod["hostNetwork"], pod["hostPID"], pod["hostIPC"]} == {False}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **({"add": ["SYS_ADMIN"]} if mode is Mode.ENFORCE else {})},
    }
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/var/lib/wattlock": False, "/var/lib/kubelet/pod-resources": True}


def test_pod_monitors_look_where_the_pods_are(helm):
    objects = helm.render(*MATRIX["agents apart"])
    for component, namespace, port in (("operator", "wattlock-system", 8080), ("agent", "gpu-agents", 9400)):
        monitor = named(objects, "PodMonitor", f"wattlock-{component}")["spec"]
        assert monitor["namespaceSelector"] == {"matchNames": [namespace]}
        (container,) = pods(objects)[component]["containers"]
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert {"name": endpoint["port"], "containerPort": port, "protocol": "TCP"} in container["ports"]
        assert endpoint["honorLabels"] is True, "namespace and pod are labels of our own series"
        labels = (
            agent_template(objects) if component == "agent" else named(objects, "Deployment", "wattlock-operator")
        )["spec"]["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
