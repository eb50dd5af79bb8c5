<?php
if (($argv[1] ?? "") === "check") {
    exit("ok\n");
}
$server = stream_socket_server("tcp://0.0.0.0:3000");
while (true) {
    $caller = @stream_socket_accept($server, -1);
    $path = explode(" ", (string) fgets($caller))[1] ?? "";
    while (trim((string) fgets($caller)) !== "");
    $body = "served $path";
    fwrite($caller, "HTTP/1.1 200 OK\r\nContent-Length: " . strlen($body) . "\r\nConnection: close\r\n\r\n$body");
    fclose($caller);
}
