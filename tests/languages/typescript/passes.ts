import { readFileSync } from "node:fs";

const name: string = readFileSync(0, "utf8").trim();
const sum = process.argv.slice(2).reduce((sum: number, word: string) => sum + Number(word), 0);
console.log(`Hello ${name} ${sum}`);
