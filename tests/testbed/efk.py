"""The manifests of infrastructure/ for Elasticsearch, fluentd and Kibana: taken by the API server by its own rules,
and whole in themselves. fluentd and Kibana are in no registry that the bed reaches, so nothing of them runs here."""

import glob
import json
import os
import pathlib
import re
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
INFRASTRUCTURE = REPOSITORY / "infrastructure"
FILES = ["elasticsearch.yaml", "rbac.yaml", "fluentd.yaml", "kibana.yaml", "ingress.yaml"]
NAMESPACE = "gantry-logs"
# One request to the API server, which may be busy with other tests.
SECONDS = 60
# Plugins of fluentd itself, and those in the image that fluentd.yaml names.
PLUGINS = {"tail", "regexp", "concat", "relabel", "kubernetes_metadata", "record_transformer", "elasticsearch_genid", "elasticsearch", "file"}
# What the records of other programs have besides.
OWN_FIELDS = {"host.name"}


def kubectl(*arguments, stdin=None):
    done = subprocess.run([os.environ["TESTBED_KUBECTL"], *arguments], input=stdin, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}"
    return done.stdout


def leaves(properties, path=""):
    """Every field of a mapping with its type."""
    for name, field in properties.items():
        if "type" in field:
            yield path + name, field["type"]
        yield from leaves(field.get("properties", {}), f"{path}{name}.")


def applied_by_the_servers_rules():
    """Each file, and then again: a second time nothing changes. Really applied is what needs no image."""
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))
    try:
        for file in FILES:
            kubectl("apply", "--dry-run=server", "--validate=strict", "-f", INFRASTRUCTURE / file)
        for file in ("rbac.yaml", "ingress.yaml"):
            kubectl("apply", "--validate=strict", "-f", INFRASTRUCTURE / file)
            again = kubectl("apply", "--validate=strict", "-f", INFRASTRUCTURE / file)
            assert all(line.endswith("unchanged") for line in again.splitlines()), again
        account = f"system:serviceaccount:{NAMESPACE}:fluentd"
        for verb, what, allowed in (("watch", "pods", "yes"), ("get", "namespaces", "yes"), ("get", "secrets", "no"), ("delete", "pods", "no")):
            asked = [os.environ["TESTBED_KUBECTL"], "auth", "can-i", verb, what, "--as", account, "-n", NAMESPACE]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS).stdout.strip()
            assert said == allowed, f"{verb} {what}: {said}"
    finally:
        for file in ("rbac.yaml", "ingress.yaml"):
            kubectl("delete", "--ignore-not-found", "-f", INFRASTRUCTURE / file)
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def config_map():
    text = kubectl("create", "--dry-run=client", "-o", "json", "-f", INFRASTRUCTURE / "fluentd.yaml")
    decoder, objects, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        found, end = decoder.raw_decode(rest)
        objects.append(found)
        rest = rest[end:].strip()
    return next(each["data"] for each in objects if each["kind"] == "ConfigMap")


def fluentd_is_well_formed(data):
    """Every section is closed, every plugin is in the image, and every record goes somewhere."""
    configuration, open_sections = data["fluent.conf"], []
    for number, line in enumerate(configuration.splitlines(), 1):
        line = line.strip()
        if match := re.fullmatch(r"</(\w+)>", line):
            assert open_sections and open_sections.pop() == match[1], f"line {number}: {line}"
        elif match := re.fullmatch(r"<(\w+)(?: ([^<>]+))?>", line):
            open_sections.append(match[1])
        elif match := re.fullmatch(r"@type (\S+)", line):
            assert match[1] in PLUGINS, f"line {number}: {match[1]} is not in the image"
    assert not open_sections, f"not closed: {open_sections}"
    labels = set(re.findall(r"^\s*<label (@\w+)>", configuration, re.MULTILINE))
    named = set(re.findall(r"^\s*(?:@label|timeout_label) (@\w+)", configuration, re.MULTILINE))
    assert named == labels, f"{named} are named, {labels} are there"


def records_have_the_shape_of_gantrys(data):
    """The fields that fluentd writes are mapped, and each as Gantry's template maps it."""
    own = json.loads((REPOSITORY / "src/logs/elasticsearch/template.json").read_text())["template"]["mappings"]
    theirs = json.loads(data["template.json"])["template"]["mappings"]
    assert theirs["dynamic"] is False and own["dynamic"] is False
    known, mapped = dict(leaves(own["properties"])), dict(leaves(theirs["properties"]))
    for name, kind in mapped.items():
        assert name in OWN_FIELDS or known.get(name) == kind, f"{name} is {kind}, Gantry's is {known.get(name)}"
    record = re.search(r"<record>(.*?)</record>", data["fluent.conf"], re.DOTALL)[1]
    written = {line.split()[0] for line in record.strip().splitlines()}
    assert written == set(mapped), written ^ set(mapped)


def lines_of_a_container_are_understood(data):
    """The pattern reads what the container runtime has written down of a pod of the bed."""
    pattern = re.search(r"^\s*expression /(.*)/$", data["fluent.conf"], re.MULTILINE)[1]
    pattern = re.compile(pattern.replace("(?<", "(?P<"))
    pod = f"efk-lines-{os.getpid()}"
    said = "echo one; echo two >&2; printf three; head -c 40000 /dev/zero | tr '\\0' x"
    image = os.environ["RUNNER_IMAGE"]
    kubectl("run", pod, f"--image={image}", "--image-pull-policy=IfNotPresent", "--restart=Never", "--command", "--", "bash", "-c", said)
    try:
        kubectl("wait", f"pod/{pod}", "--for=jsonpath={.status.phase}=Succeeded", f"--timeout={SECONDS - 5}s")
        [name] = glob.glob(f"/var/log/containers/{pod}_*.log")
        with open(name) as file:
            written = file.read().splitlines()
    finally:
        kubectl("delete", "pod", pod, "--now")
    found = []
    for line in written:
        match = pattern.match(line)
        assert match, f"{name}: {line!r}"
        assert re.fullmatch(r"[\d-]+T[\d:.]+(Z|[+-]\d\d:\d\d)", match["time"]), line
        found.append(match["stream"])
    # The long line without an end comes in parts.
    assert found.count("stderr") == 1 and found.count("stdout") > 2, written
    return len(found)


def kibana_objects_lead_somewhere():
    """Every reference is there, and every field that is shown or counted is one that records have."""
    own = json.loads((REPOSITORY / "src/logs/elasticsearch/template.json").read_text())["template"]["mappings"]
    fields = {name for name, _ in leaves(own["properties"])}
    objects = [json.loads(line) for line in (INFRASTRUCTURE / "kibana" / "gantry.ndjson").read_text().splitlines()]
    known = {(each["type"], each["id"]) for each in objects}
    titles = {(each["type"], each["attributes"]["title"]) for each in objects}
    assert {("dashboard", "submissions"), ("search", "failures")} <= titles, titles
    for each in objects:
        for reference in each["references"]:
            assert (reference["type"], reference["id"]) in known, f"{each['id']} leads to {reference}"
        attributes = each["attributes"]
        for name in attributes.get("columns", []):
            assert name in fields, f"{each['id']}: {name}"
        for part in json.loads(attributes.get("visState", "{}")).get("aggs", []):
            assert part["params"].get("field", "@timestamp") in fields, f"{each['id']}: {part}"
        for panel in json.loads(attributes.get("panelsJSON", "[]")):
            assert any(r["name"].endswith(panel["panelRefName"]) for r in each["references"]), panel
    return len(objects)


def main():
    applied_by_the_servers_rules()
    data = config_map()
    fluentd_is_well_formed(data)
    records_have_the_shape_of_gantrys(data)
    lines = lines_of_a_container_are_understood(data)
    objects = kibana_objects_lead_somewhere()
    print(f"{len(FILES)} manifests taken, {lines} lines of a container understood, {objects} objects of Kibana whole")


if __name__ == "__main__":
    sys.exit(main())
