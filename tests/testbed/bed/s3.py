"""S3: versitygw over a folder, with one bucket; and a request signed as S3 wants it."""

import datetime
import hashlib
import hmac
import urllib.error
import urllib.request

from .build import binary
from .process import Process, wait_for
from .settings import HOST, S3_BUCKET, S3_KEY, S3_PORT, S3_REGION, S3_SECRET, STATE

PROCESS = Process("s3")
# Seen: under 1 s.
READY_SECONDS = 20
ENDPOINT = f"http://{HOST}:{S3_PORT}"


def request(method, path, body=b"", seconds=10):
    """One request with AWS signature version 4; path without a query."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    day, payload = now[:8], hashlib.sha256(body).hexdigest()
    headers = {"host": f"{HOST}:{S3_PORT}", "x-amz-content-sha256": payload, "x-amz-date": now}
    names = ";".join(headers)
    canonical = "\n".join([method, path, "", *(f"{k}:{v}" for k, v in headers.items()), "", names, payload])
    scope = f"{day}/{S3_REGION}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{S3_SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    headers["Authorization"] = f"AWS4-HMAC-SHA256 Credential={S3_KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
    call = urllib.request.Request(ENDPOINT + path, method=method, data=body if method in ("PUT", "POST") else None, headers=headers)
    with urllib.request.urlopen(call, timeout=seconds) as answer:
        return answer.read()


def start():
    (STATE / "s3").mkdir(parents=True, exist_ok=True)
    PROCESS.start(
        [binary("versitygw"), "--port", f"{HOST}:{S3_PORT}", "--region", S3_REGION, "--quiet", "posix", STATE / "s3"],
        env={"ROOT_ACCESS_KEY": S3_KEY, "ROOT_SECRET_KEY": S3_SECRET},
    )


def ready():
    try:
        request("PUT", f"/{S3_BUCKET}")
    except urllib.error.HTTPError as error:
        return error.code == 409  # the bucket is there
    return True


def wait():
    wait_for("s3", READY_SECONDS, ready, PROCESS)


def up():
    start()
    wait()
