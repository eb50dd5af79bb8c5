local socket = require("socket")

if arg[1] == "check" then
  print("ok")
  os.exit()
end

local server = assert(socket.bind("*", 3000))
while true do
  local caller = server:accept()
  local first = caller:receive() or ""
  local path = first:match("^%S+ (%S+)") or ""
  repeat local line = caller:receive() until not line or line == ""
  local body = "served " .. path
  caller:send("HTTP/1.1 200 OK\r\nContent-Length: " .. #body .. "\r\nConnection: close\r\n\r\n" .. body)
  caller:close()
end
