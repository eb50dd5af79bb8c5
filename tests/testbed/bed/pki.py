"""Keys, certificates and kubeconfigs, made once for each life of the bed."""

import json
import secrets

from .process import run
from .settings import API_PORT, API_SERVICE, DOMAIN, HOST, PKI, STATE

DAYS = "3650"


def write(path, command, input=None):
    """A file is whole or not there: a run that was cut off leaves nothing the next one would take for good."""
    partial = path.with_suffix(".part")
    partial.write_text(run(command, input=input))
    partial.chmod(0o600)
    partial.rename(path)


def key(name):
    path = PKI / f"{name}.key"
    if not path.exists():
        write(path, ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"])
    return path


def authority(name):
    path = PKI / f"{name}.crt"
    if not path.exists():
        write(path, ["openssl", "req", "-x509", "-new", "-key", key(name), "-subj", f"/CN={name}", "-days", DAYS])
    return path


def certificate(name, subject, names=(), authority_name="ca"):
    path = PKI / f"{name}.crt"
    if path.exists():
        return path
    extensions = "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n"
    if names:
        extensions += "subjectAltName=" + ",".join(names) + "\n"
    request = run(["openssl", "req", "-new", "-key", key(name), "-subj", subject])
    extension_file = PKI / f"{name}.ext"
    extension_file.write_text(extensions)
    write(
        path,
        ["openssl", "x509", "-req", "-CA", PKI / f"{authority_name}.crt", "-CAkey", key(authority_name),
         "-set_serial", f"0x{secrets.token_hex(8)}", "-days", DAYS, "-extfile", extension_file],
        input=request,
    )
    return path


def kubeconfig(path, name):
    path.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "testbed",
        "clusters": [{"name": "testbed", "cluster": {
            "server": f"https://{HOST}:{API_PORT}", "certificate-authority": str(PKI / "ca.crt")}}],
        "users": [{"name": name, "user": {
            "client-certificate": str(PKI / f"{name}.crt"), "client-key": str(PKI / f"{name}.key")}}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": name}}],
    }))
    path.chmod(0o600)
    return path


def client(name, user, group=None):
    """A client certificate and its kubeconfig."""
    certificate(name, (f"/O={group}" if group else "") + f"/CN={user}")
    return kubeconfig(STATE / f"{name}.kubeconfig", name)


def make():
    PKI.mkdir(parents=True, exist_ok=True)
    authority("ca")
    authority("front-proxy-ca")
    certificate("front-proxy", "/CN=front-proxy", authority_name="front-proxy-ca")
    certificate("apiserver", "/CN=kube-apiserver", [
        f"IP:{HOST}", f"IP:{API_SERVICE}", "DNS:kubernetes", "DNS:kubernetes.default",
        "DNS:kubernetes.default.svc", f"DNS:kubernetes.default.svc.{DOMAIN}"])
    certificate("apiserver-kubelet", "/O=system:masters/CN=apiserver-kubelet")
    service_account = key("service-account")
    if not (PKI / "service-account.pub").exists():
        run(["openssl", "ec", "-in", service_account, "-pubout", "-out", PKI / "service-account.pub"])
    client("admin", "admin", "system:masters")
    client("controller-manager", "system:kube-controller-manager")
    client("scheduler", "system:kube-scheduler")
    client("kube-proxy", "system:kube-proxy")
    # The ingress controller knows tokens only.
    token = PKI / "ingress.token"
    if not token.exists():
        token.write_text(secrets.token_hex(16))
        (PKI / "tokens.csv").write_text(f"{token.read_text()},testbed:ingress,ingress\n")
    # The parts that a cluster usually runs as pods are programs on the machine here; each has a user of its own.
    for part in ("coredns", "volumes", "metrics-server", "policies"):
        client(part, f"testbed:{part}")


def node(name, address):
    certificate(f"kubelet-{name}", f"/O=system:nodes/CN=system:node:{name}", [f"DNS:{name}", f"IP:{address}"])
    return kubeconfig(STATE / f"kubelet-{name}.kubeconfig", f"kubelet-{name}")
