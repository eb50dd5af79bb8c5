// A name server of a test's own, on loopback: it knows the texts that it is told, and no other name.
import { createSocket } from "node:dgram";

const HEADER_BYTES = 12;
const TXT = 16;
const INTERNET = 1;
/** A response that recursion was asked for and is offered with; the name is there, or it is not. */
const FOUND = 0x8180;
const NO_SUCH_NAME = 0x8183;
/** In an answer: the name is the question's. */
const SAME_NAME = 0xc000 | HEADER_BYTES;

function questionOf(message) {
  const labels = [];
  let at = HEADER_BYTES;
  while (message[at]) {
    labels.push(message.toString("ascii", at + 1, at + 1 + message[at]));
    at += message[at] + 1;
  }
  return { name: labels.join(".").toLowerCase(), type: message.readUInt16BE(at + 1), bytes: message.subarray(HEADER_BYTES, at + 5) };
}

function textRecord(text) {
  const head = Buffer.alloc(12);
  head.writeUInt16BE(SAME_NAME, 0);
  head.writeUInt16BE(TXT, 2);
  head.writeUInt16BE(INTERNET, 4);
  head.writeUInt32BE(60, 6);
  head.writeUInt16BE(text.length + 1, 10);
  return Buffer.concat([head, Buffer.from([text.length]), Buffer.from(text)]);
}

export class Dns {
  texts = new Map();

  static async start() {
    const dns = new Dns();
    dns.socket = createSocket("udp4", (message, peer) => dns.socket.send(dns.answer(message), peer.port, peer.address));
    await new Promise((done) => dns.socket.bind(0, "127.0.0.1", done));
    dns.address = `127.0.0.1:${dns.socket.address().port}`;
    return dns;
  }

  answer(message) {
    const { name, type, bytes } = questionOf(message);
    const text = this.texts.get(name);
    const answers = text !== undefined && type === TXT ? [textRecord(text)] : [];
    const header = Buffer.alloc(HEADER_BYTES);
    message.copy(header, 0, 0, 2);
    header.writeUInt16BE(text === undefined ? NO_SUCH_NAME : FOUND, 2);
    header.writeUInt16BE(1, 4);
    header.writeUInt16BE(answers.length, 6);
    return Buffer.concat([header, bytes, ...answers]);
  }

  stop() {
    this.socket.close();
  }
}
