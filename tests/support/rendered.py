"""Finds its way in what the chart renders."""

from typing import Any

import yaml


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """Return the one object of a kind and a name."""
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def kinds(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [o for o in objects if o["kind"] == kind]


def agent_template(objects: list[dict[str, Any]], name: str = "wattlock-agent-template") -> dict[str, Any]:
    """Return the DaemonSet that the operator reads."""
    daemonset = yaml.safe_load(named(objects, "ConfigMap", name)["data"]["agent-daemonset.yaml"])
    assert (daemonset["apiVersion"], daemonset["kind"]) == ("apps/v1", "DaemonSet")
    return daemonset


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod spec of everything that runs, by component."""
    found = {}
    for o in [*objects, agent_template(objects)]:
        if o["kind"] in ("Deployment", "DaemonSet", "Job"):
            found[o["metadata"]["labels"]["app.kubernetes.io/component"]] = o["spec"]["template"]["spec"]
        elif o["kind"] == "Pod":
            found[o["metadata"]["labels"]["app.kubernetes.io/component"]] = o["spec"]
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def strings(value: Any, place: str) -> None:
    """Fail where labels, annotations, selectors or environment hold something else than text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str), f"{place}: key {key!r}"
            if key in ("labels", "annotations", "matchLabels", "nodeSelector") and isinstance(inner, dict):
                assert all(isinstance(text, str) for text in inner.values()), f"{place}.{key}: {inner}"
            if key == "env":
                assert all(isinstance(entry.get("value", ""), str) for entry in inner), f"{place}.env: {inner}"
            strings(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            strings(inner, f"{place}[{index}]")
