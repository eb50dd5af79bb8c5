local name = io.read()
local sum = 0
for _, word in ipairs(arg) do sum = sum + math.tointeger(tonumber(word)) end
print("Hello " .. name .. " " .. sum)
