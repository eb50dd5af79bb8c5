require "socket"

if ARGV == ["check"]
  puts "ok"
  exit
end

server = TCPServer.new(3000)
loop do
  caller = server.accept
  path = caller.gets.to_s.split[1]
  nil until caller.gets.to_s.strip.empty?
  body = "served #{path}"
  caller.write "HTTP/1.1 200 OK\r\nContent-Length: #{body.bytesize}\r\nConnection: close\r\n\r\n#{body}"
  caller.close
end
