// node in_node.js SCRIPTS... < {"page": FILE, "texts": [...], "tokens": [...], "write": N}: what the page's scripts make of it, as JSON.
"use strict";
const fs = require("fs");
const vm = require("vm");

const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const context = vm.createContext({ TextEncoder, TextDecoder, setTimeout, performance, console });
for (const script of process.argv.slice(2)) vm.runInContext(fs.readFileSync(script, "utf8"), context);
const page = fs.readFileSync(asked.page, "utf8");
const inside = (id) => page.match(new RegExp(`id="${id}">([^<]*)<`))[1];
context.description = JSON.parse(inside("description"));
const raw = Buffer.from(inside("arrays"), "base64");
context.bytes = raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length);
context.asked = asked;

const answer = vm.runInContext(
  `(() => {
    const tokenizer = openTokenizer(description.tokenizer);
    const encoded = asked.texts.map((text) => tokenizer.encode(text));
    const decoded = encoded.map((tokens) => tokens.map(tokenizer.decoder()).join(""));
    const reader = new Reader(new Step(description.model, bytes));
    const logits = asked.tokens.map((token) => {
      reader.read(token);
      return Array.from(reader.logits);
    });
    const bits = reader.bits.slice();
    if (asked.again) {
      reader.forget(asked.again);
      asked.tokens.slice(reader.tokens.length).forEach((token) => reader.read(token));
    }
    const random = randomNumbers(asked.seed || 0);
    const written = [];
    for (let i = 0; i < (asked.write || 0); ++i) {
      written.push(draw(reader.logits, asked.temperature || 0, random));
      reader.read(written[i]);
    }
    return JSON.stringify({ encoded, decoded, logits, bits, written });
  })()`,
  context,
);
console.log(answer);
