"""What a schema does not see: names that must exist elsewhere, mounts that must be the same."""

from __future__ import annotations

from typing import Any

from deploy.manifests import commands, objects, of_kind, pods, services

USERS = ("kvpool", "engines")
"""Workloads that map the pool."""


def mounted(pod: dict[str, Any]) -> dict[str, str]:
    """Where -> name of the volume."""
    return {m["mountPath"]: m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}


def test_the_pool_is_the_same_memory_everywhere() -> None:
    (folder,) = {
        command.values["--shm-dir"]
        for command in commands("vllm-kvpool")
        if "serve" in command.words
    }
    places = set()
    for name in USERS:
        volumes = {volume["name"]: volume for volume in pods()[name]["volumes"]}
        path = volumes[mounted(pods()[name])[folder]]["hostPath"]
        assert path["type"] == "DirectoryOrCreate"
        places.add(path["path"])
    sharing = [name for name, service in services().items() if "image" in service]
    for name in ("pool", *(name for name in sharing if name.startswith("engine"))):
        (bind,) = (v for v in services()[name]["volumes"] if v.endswith(f":{folder}"))
        places.add(bind.removesuffix(f":{folder}"))
    (place,) = places
    assert place.startswith("/dev/shm/")


def test_daemon_and_engines_run_as_one_user_on_the_same_nodes() -> None:
    pool, engines = (pods()[name] for name in USERS)
    assert pool["nodeSelector"] == engines["nodeSelector"]
    assert pool["tolerations"] == engines["tolerations"]
    for pod in (pool, engines):
        for context in (pod, *pod["containers"]):
            assert "runAsUser" not in context.get("securityContext", {})


def test_every_mount_has_its_volume() -> None:
    for name, pod in pods().items():
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert set(mounted(pod).values()) == volumes, name


def test_files_that_commands_name_are_mounted() -> None:
    for name, pod in pods().items():
        for command in (c for c in commands("vllm-kvpool") if c.where == name):
            for option in ("--config", "--keys"):
                if (file := command.values.get(option)) is not None:
                    assert any(f"{file}/".startswith(f"{place}/") for place in mounted(pod)), file


def test_probes_ask_ports_that_exist() -> None:
    for name, pod in pods().items():
        for container in pod["containers"]:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for kind in ("httpGet", "tcpSocket"):
                    asked = container.get(probe, {}).get(kind)
                    assert asked is None or asked["port"] in ports, f"{name} {probe}"


def labels_to_ports() -> dict[str, set[str]]:
    found = {}
    for made in of_kind("DaemonSet", "Deployment"):
        template = made["spec"]["template"]
        assert made["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        ports = {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
        found[template["metadata"]["labels"]["app"]] = ports
    return found


def test_services_and_policies_select_pods_and_ports_that_exist() -> None:
    known = labels_to_ports()
    for made in of_kind("Service"):
        wanted = {port["targetPort"] for port in made["spec"]["ports"]}
        assert wanted <= known[made["spec"]["selector"]["app"]]
    for made in of_kind("NetworkPolicy"):
        ports = known[made["spec"]["podSelector"]["matchLabels"]["app"]]
        for rule in made["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports
            assert all(peer["podSelector"]["matchLabels"]["app"] in known for peer in rule["from"])
    for made in of_kind("PodDisruptionBudget"):
        assert made["spec"]["selector"]["matchLabels"]["app"] in known


def test_one_namespace() -> None:
    (space,) = of_kind("Namespace")
    others = {m["metadata"].get("namespace") for m in objects() if m["kind"] != "Namespace"}
    assert others == {space["metadata"]["name"]}


def test_the_router_asks_for_the_engines_service() -> None:
    (route,) = (c for c in commands("vllm-kvpool") if c.where == "router")
    host, port = route.words[-1].removeprefix("dns://").split(":")
    (service,) = (m for m in of_kind("Service") if m["metadata"]["name"] == "engines")
    assert host == f"engines.{service['metadata']['namespace']}.svc.cluster.local"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None"
    (engine,) = pods()["engines"]["containers"]
    (serve,) = (c for c in commands("vllm") if c.where == "engines")
    assert int(serve.values["--port"]) == engine["ports"][0]["containerPort"] == int(port)


def test_names_in_the_compose_file_exist() -> None:
    from urllib.parse import urlsplit

    (route,) = (c for c in commands("vllm-kvpool") if c.where == "compose router")
    for replica in (word for word in route.words if "=http://" in word):
        address = urlsplit(replica.split("=", 1)[1])
        engine = services()[address.hostname or ""]
        assert f"--port={address.port}" in engine["command"]
    for service in services().values():
        assert set(service.get("depends_on", ())) <= set(services())
