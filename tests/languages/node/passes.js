const name = require("node:fs").readFileSync(0, "utf8").trim();
const sum = process.argv.slice(2).reduce((sum, word) => sum + Number(word), 0);
console.log(`Hello ${name} ${sum}`);
