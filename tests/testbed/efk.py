"""The manifests of infrastructure/ for Elasticsearch, fluentd and Kibana: taken by the API server by its own rules,
and whole in themselves. fluentd and Kibana are in no registry that the bed reaches, so nothing of them runs here.
`--no-cluster` leaves the API server out."""

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


def fluentd(stream="stdout", **variables):
    """What fluentd makes of its configuration in a pod of its DaemonSet."""
    more = [f"{name}={value}" for name, value in variables.items()]
    command = ["ruby", pathlib.Path(__file__).with_name("fluentd.rb"), INFRASTRUCTURE / "fluentd.yaml", stream, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"fluentd.yaml: {done.stderr}"
    return json.loads(done.stdout)


def parameters(made, kind):
    """Those of the section with this @type."""
    [found] = [each["parameters"] for each in made["sections"] if each["parameters"].get("@type") == kind]
    return found


def fluentd_is_well_formed(made):
    """Every plugin is in the image, every record goes somewhere, and no name is one that fluentd keeps for itself."""
    sections = made["sections"]
    for each in sections:
        kind = each["parameters"].get("@type")
        assert kind is None or kind in PLUGINS, f"{kind} is not in the image"
        if each["name"] == "record":
            reserved = [name for name in each["parameters"] if name.startswith("@")]
            assert not reserved, f"{reserved} are fluentd's own names"
    labels = {each["argument"] for each in sections if each["name"] == "label"}
    names = ("@label", "timeout_label")
    named = {each["parameters"][name] for each in sections for name in names if name in each["parameters"]}
    assert named == labels, f"{named} are named, {labels} are there"


def in_a_pod_fluentd_finds_the_api_server(made):
    """What the plugin finds by itself it looks for only where nothing is given, not even an empty text."""
    metadata = parameters(made, "kubernetes_metadata")
    for name in ("kubernetes_url", "ca_file", "client_cert", "client_key"):
        assert metadata[name] is None, f"{name} is {metadata[name]!r} in a pod"
    given = parameters(fluentd(KUBERNETES_URL="https://10.0.0.1:6443/api"), "kubernetes_metadata")
    assert given["kubernetes_url"] == "https://10.0.0.1:6443/api"


def records_tell_their_stream():
    """An error's line is one in the index, too."""
    for stream, level in (("stdout", "info"), ("stderr", "warn")):
        made = fluentd(stream)["made"]
        assert made["event.action"] == f"output.{stream}" and made["log.level"] == level, made
        assert made["user.id"] == "ada" and made["gantry.repl_id"] == "shop", made


def the_template_is_for_the_indices():
    """Whatever their names begin with."""
    for prefix, variables in (("cluster-logs", {}), ("other", {"ELASTICSEARCH_PREFIX": "other"})):
        made = fluentd(**variables)
        output = parameters(made, "elasticsearch")
        text = made["template"]
        for word, value in json.loads(output["customize_template"]).items():
            text = text.replace(word, value)
        assert output["logstash_prefix"] == prefix, output
        assert json.loads(text)["index_patterns"] == [f"{prefix}-*"], text


def records_have_the_shape_of_gantrys(made):
    """The fields that fluentd writes are mapped, and each as Gantry's template maps it."""
    own = json.loads((REPOSITORY / "src/logs/elasticsearch/template.json").read_text())["template"]["mappings"]
    theirs = json.loads(made["template"])["template"]["mappings"]
    assert theirs["dynamic"] is False and own["dynamic"] is False
    known, mapped = dict(leaves(own["properties"])), dict(leaves(theirs["properties"]))
    for name, kind in mapped.items():
        assert name in OWN_FIELDS or known.get(name) == kind, f"{name} is {kind}, Gantry's is {known.get(name)}"
    # With logstash_format the output adds the time, as fine as it is told.
    output = parameters(made, "elasticsearch")
    assert output["logstash_format"] == "true" and output["time_precision"] == "9", output
    written = {*made["made"], "@timestamp"}
    assert written == set(mapped), written ^ set(mapped)


def lines_of_a_container_are_understood(made):
    """The pattern reads what the container runtime has written down of a pod of the bed."""
    pattern = parameters(made, "regexp")["expression"].strip("/")
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
    made = fluentd()
    fluentd_is_well_formed(made)
    in_a_pod_fluentd_finds_the_api_server(made)
    records_tell_their_stream()
    the_template_is_for_the_indices()
    records_have_the_shape_of_gantrys(made)
    objects = kibana_objects_lead_somewhere()
    print(f"fluentd's configuration and {objects} objects of Kibana are whole")
    if "--no-cluster" in sys.argv[1:]:
        return
    applied_by_the_servers_rules()
    lines = lines_of_a_container_are_understood(made)
    print(f"{len(FILES)} manifests taken, {lines} lines of a container understood")


if __name__ == "__main__":
    sys.exit(main())
