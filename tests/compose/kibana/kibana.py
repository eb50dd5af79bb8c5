"""What Kibana is asked by compose.yaml and by infrastructure/kibana/import, answered by its rules."""

import http.server
import json
import os
import urllib.parse
import urllib.request

ELASTICSEARCH = os.environ["ELASTICSEARCH_HOSTS"]
# Of one answer of Elasticsearch: the health check asks every few seconds.
SECONDS = 3


def refused(objects):
    """Objects whose references lead nowhere, or that have no type or id."""
    known = {(each.get("type"), each.get("id")) for each in objects}
    for each in objects:
        complete = each.get("type") and each.get("id") and isinstance(each.get("attributes"), dict)
        if not complete or any((reference["type"], reference["id"]) not in known for reference in each["references"]):
            yield {"id": each.get("id"), "type": each.get("type"), "error": {"type": "missing_references"}}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/api/status":
            return self.answer(404, {})
        try:
            urllib.request.urlopen(ELASTICSEARCH + "/_cluster/health", timeout=SECONDS).read()
        except OSError:
            return self.answer(503, {"status": {"overall": {"level": "unavailable"}}})
        self.answer(200, {"status": {"overall": {"level": "available"}}})

    def do_POST(self):
        url = urllib.parse.urlparse(self.path)
        if url.path != "/api/saved_objects/_import":
            return self.answer(404, {})
        if not self.headers.get("kbn-xsrf"):
            return self.answer(400, {"message": "Request must contain a kbn-xsrf header."})
        body = self.rfile.read(int(self.headers["content-length"]))
        boundary = self.headers["content-type"].partition("boundary=")[2].encode()
        part = body.split(b"--" + boundary)[1].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        objects = [json.loads(line) for line in part.splitlines()]
        errors = list(refused(objects))
        answer = {"successCount": len(objects) - len(errors), "success": not errors}
        self.answer(200, {**answer, "errors": errors} if errors else answer)

    def answer(self, status, body):
        text = json.dumps(body, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


http.server.ThreadingHTTPServer(("0.0.0.0", 5601), Handler).serve_forever()
