if (process.argv[2] === "check") {
  console.log("ok");
} else {
  require("node:http").createServer((request, response) => response.end(`served ${request.url}`)).listen(3000);
}
