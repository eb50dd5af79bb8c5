import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if sys.argv[1:] == ["check"]:
    print("ok")
    sys.exit()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"served {self.path}".encode())


HTTPServer(("", 3000), Handler).serve_forever()
