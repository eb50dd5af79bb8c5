"""A small client of the Kubernetes API: starting kubectl for each question would cost the bed its start time."""

import json
import ssl
import urllib.error
import urllib.request

from .settings import API_PORT, HOST, PKI, BedError

# Every answer is small and the server is on this machine.
REQUEST_SECONDS = 10


def request(method, path, body=None, content_type="application/json"):
    context = ssl.create_default_context(cafile=PKI / "ca.crt")
    context.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    call = urllib.request.Request(
        f"https://{HOST}:{API_PORT}{path}", data=data, method=method, headers={"Content-Type": content_type}
    )
    with urllib.request.urlopen(call, timeout=REQUEST_SECONDS, context=context) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.startswith("{") else text


def get(path):
    return request("GET", path)


PLURALS = {"StorageClass": "storageclasses", "EndpointSlice": "endpointslices", "IngressClass": "ingressclasses"}
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "StorageClass", "IngressClass", "Namespace", "Node", "APIService"}


def apply(item):
    """Server-side apply of one object."""
    version, kind, meta = item["apiVersion"], item["kind"], item["metadata"]
    path = "/api/v1" if version == "v1" else f"/apis/{version}"
    if kind not in CLUSTER_WIDE:
        path += f"/namespaces/{meta.get('namespace', 'default')}"
    path += f"/{PLURALS.get(kind, kind.lower() + 's')}/{meta['name']}?fieldManager=testbed&force=true"
    try:
        return request("PATCH", path, item, "application/apply-patch+yaml")
    except urllib.error.HTTPError as error:
        raise BedError(f"the API server refused {kind} {meta['name']}: {error.code} {error.read().decode()[:500]}") from error
