#!/usr/bin/env node
// Calls a Python module straight, without Gantry in between: an example of a gRPC client.
//
//     npm install                             # @grpc/grpc-js and @grpc/proto-loader
//     export MODULE_TOKEN=…                   # "token" of POST /create_pod/math
//     node client.mjs HOST call sqrt 16       # HOST: "authority" of POST /create_pod/math
//     node client.mjs HOST stream FUNCTION ARGUMENT…
//     node client.mjs HOST describe
//
// Arguments are JSON. `--plain ADDRESS` goes to an ingress controller that has no TLS.

import { fileURLToPath } from "node:url";
import { parseArgs, promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("../../../runner-image/module_service.proto", import.meta.url));
const { ModuleService } = grpc.loadPackageDefinition(
  loader.loadSync(PROTO, { keepCase: true, enums: String, oneofs: true, defaults: true }),
).gantry.module.v1;

// A call may run for 60 s; the rest is for the way.
const TIMEOUT_MS = 65_000;

// A result has at most 16 MiB, and something goes with it.
const OPTIONS = { "grpc.max_receive_message_length": 17 << 20 };

function connect(host, plain) {
  if (plain) {
    return new ModuleService(plain, grpc.credentials.createInsecure(), { ...OPTIONS, "grpc.default_authority": host });
  }
  return new ModuleService(`${host}:443`, grpc.credentials.createSsl(), OPTIONS);
}

/** The result, or why there is none: a function that fails is no failure of gRPC's. */
function told(reply) {
  if (reply.outcome === "failure") throw new Error(`${reply.failure.kind}: ${reply.failure.message}`);
  return JSON.stringify(JSON.parse(reply.result));
}

async function main() {
  const { values, positionals } = parseArgs({
    options: { plain: { type: "string" } },
    allowPositionals: true,
  });
  const [host, action, method, ...rest] = positionals;
  const request = { method, args: Buffer.from(JSON.stringify(rest.map((text) => JSON.parse(text)))) };
  const metadata = new grpc.Metadata();
  if (process.env.MODULE_TOKEN) metadata.set("authorization", `Bearer ${process.env.MODULE_TOKEN}`);
  const module = connect(host, values.plain);
  const options = { deadline: Date.now() + TIMEOUT_MS };
  if (action === "call") {
    console.log(told(await promisify(module.Call.bind(module))(request, metadata, options)));
  } else if (action === "stream") {
    for await (const event of module.Stream(request, metadata, options)) {
      if (event.event === "item") console.log("item", JSON.stringify(JSON.parse(event.item)));
      else if (event.event === "end") console.log("end", told(event.end));
      else console.log(event.output.stream, JSON.stringify(event.output.data.toString()));
    }
  } else if (action === "describe") {
    const { functions } = await promisify(module.Describe.bind(module))({}, metadata, options);
    for (const one of functions) console.log(one.name + one.signature);
  } else {
    throw new Error("usage: client.mjs [--plain ADDRESS] HOST call|stream|describe [FUNCTION [ARGUMENT…]]");
  }
  module.close();
}

main().catch((error) => {
  const code = grpc.status[error.code];
  console.error(code ? `${code}: ${error.details}` : error.message);
  process.exit(1);
});
