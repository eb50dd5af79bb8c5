import { createServer } from "node:http";

if (process.argv[2] === "check") {
  console.log("ok");
} else {
  createServer((request, response) => response.end(`served ${request.url}`)).listen(3000);
}
