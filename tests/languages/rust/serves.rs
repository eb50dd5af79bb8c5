use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("check") {
        println!("ok");
        return;
    }
    let listener = TcpListener::bind("0.0.0.0:3000").unwrap();
    for stream in listener.incoming().flatten() {
        let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
        let first = lines.next().unwrap_or_default();
        let _ = lines.take_while(|line| !line.is_empty()).count();
        let path = first.split(' ').nth(1).unwrap_or("");
        let body = format!("served {path}");
        let length = body.len();
        let _ = write!(&stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    }
}
