if [ "$1" = check ]; then
  echo ok
  exit
fi
# A shell cannot listen itself; it starts what can.
exec python3 -c '
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"served {self.path}".encode())
HTTPServer(("", 3000), Handler).serve_forever()'
