// The page: reads what is typed, colours it by surprise, and writes on.
"use strict";

const LEVELS = 9; // of surprise, a bit each
const SLICE = 24; // milliseconds of work before the page may answer
const KEPT_EVERY = 256; // tokens between states that are kept, so that a change in the middle is read again from there

// What a model has read: tokens, their surprise in bits, and states on the way.
class Reader {
  constructor(step) {
    this.step = step;
    this.forget(0);
  }

  // Stand at a kept state before so many tokens.
  forget(count) {
    const at = count - (count % KEPT_EVERY);
    this.states = at ? this.states.slice(0, at / KEPT_EVERY + 1) : [null];
    this.tokens = at ? this.tokens.slice(0, at) : [];
    this.bits = at ? this.bits.slice(0, at) : [];
    const kept = this.states[this.states.length - 1];
    this.step.restore(kept && kept.state);
    this.logits = kept && kept.logits.slice();
  }

  read(token) {
    this.bits.push(this.logits ? (logOfAll(this.logits) - this.logits[token]) / Math.LN2 : null);
    this.tokens.push(token);
    this.logits = this.step.advance(token);
    if (this.tokens.length % KEPT_EVERY === 0) {
      this.states.push({ state: this.step.state(), logits: this.logits.slice() });
    }
  }
}

// Numbers from 0 to 1, the same for the same seed (xorshift of 32 bits, multiplied).
function randomNumbers(seed) {
  let state = (seed ^ 0x9e3779b9) | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (Math.imul(state, 0x2c1b3c6d) >>> 0) / 2 ** 32;
  };
}

// A token of softmax(logits / temperature); the likeliest at temperature 0.
function draw(logits, temperature, random) {
  const highest = logits.reduce((most, logit) => Math.max(most, logit), -Infinity);
  if (temperature === 0) return logits.indexOf(highest);
  const weights = Array.from(logits, (logit) => Math.exp((logit - highest) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let token = 0; token < weights.length; ++token) {
    left -= weights[token];
    if (left < 0) return token;
  }
  return weights.findLastIndex((weight) => weight > 0);
}

const pause = () => new Promise((resume) => setTimeout(resume));

function openPage() {
  const at = (id) => document.getElementById(id);
  const { model, tokenizer: described } = JSON.parse(at("description").textContent);
  const raw = atob(at("arrays").textContent.trim());
  const bytes = Uint8Array.from(raw, (character) => character.charCodeAt(0)).buffer;
  const tokenizer = openTokenizer(described);
  const reader = new Reader(new Step(model, bytes));
  const [text, ground, status, button] = ["text", "ground", "status", "write"].map(at);
  let turn = 0; // whatever reads or writes stops when another turn begins
  let writing = false;
  let painted = []; // of every coloured piece of text, how many tokens had been read after it

  function paint() {
    while (painted.length && painted[painted.length - 1].end > reader.tokens.length) painted.pop().piece.remove();
    const begin = painted.length ? painted[painted.length - 1].end : 0;
    const decode = tokenizer.decoder();
    let bits = 0;
    for (let i = begin; i < reader.tokens.length; ++i) {
      bits += reader.bits[i] || 0;
      const shown = decode(reader.tokens[i]);
      if (!shown) continue;
      const piece = document.createElement("span");
      piece.textContent = shown;
      if (i > 0) piece.className = "bits" + Math.min(LEVELS, Math.round(bits));
      piece.dataset.bits = bits.toFixed(1);
      ground.insertBefore(piece, ground.lastChild);
      painted.push({ piece, end: i + 1 });
      bits = 0;
    }
    const known = painted.reduce((length, { piece }) => length + piece.textContent.length, 0);
    ground.lastChild.textContent = text.value.slice(known) + "\n";
  }

  function report(rate) {
    const counted = reader.bits.filter((bits) => bits !== null);
    const sum = counted.reduce((total, bits) => total + bits, 0);
    const mean = counted.length ? `${(sum / counted.length).toFixed(2)} bits per token` : "";
    const count = `${reader.tokens.length.toLocaleString()} tokens`;
    status.textContent = [count, mean, rate && `${Math.round(rate).toLocaleString()} tokens per second`].filter(Boolean).join(" · ");
    status.className = "";
  }

  function complain(error) {
    status.textContent = error.message;
    status.className = "error";
  }

  // Read the text as it stands; whether it was read to its end.
  async function read() {
    const mine = ++turn;
    let tokens;
    try {
      tokens = tokenizer.encode(text.value);
    } catch (error) {
      complain(error);
      reader.forget(0);
      paint();
      return false;
    }
    let same = 0;
    while (same < tokens.length && tokens[same] === reader.tokens[same]) ++same;
    if (same < reader.tokens.length) {
      reader.forget(same);
      painted.splice(0).forEach(({ piece }) => piece.remove());
    }
    while (reader.tokens.length < tokens.length) {
      const until = performance.now() + SLICE;
      while (reader.tokens.length < tokens.length && performance.now() < until) reader.read(tokens[reader.tokens.length]);
      paint();
      report();
      await pause();
      if (turn !== mine) return false;
    }
    paint();
    report();
    return true;
  }

  async function write() {
    if (text.value === "") {
      complain(new Error("type a character or more to begin with"));
      return;
    }
    if (!(await read())) return;
    const mine = ++turn;
    const temperature = Math.max(0, Number(at("temperature").value) || 0);
    const random = randomNumbers(Number(at("seed").value) || 0);
    const end = reader.tokens.length + Math.max(0, Math.floor(Number(at("count").value)) || 0);
    const decode = tokenizer.decoder();
    reader.tokens.forEach((token) => decode(token));
    begin(true);
    const began = performance.now();
    const before = reader.tokens.length;
    while (turn === mine && reader.tokens.length < end) {
      const until = performance.now() + SLICE;
      let written = "";
      while (reader.tokens.length < end && performance.now() < until) {
        const token = draw(reader.logits, temperature, random);
        reader.read(token);
        written += decode(token);
      }
      text.value += written;
      paint();
      report(((reader.tokens.length - before) * 1000) / (performance.now() - began));
      at("paper").scrollTop = at("paper").scrollHeight;
      await pause();
    }
    if (turn === mine) begin(false);
  }

  function begin(on) {
    writing = on;
    button.textContent = on ? "Stop" : "Write on";
    text.readOnly = on;
  }

  button.addEventListener("click", () => {
    if (!writing) write();
    else {
      ++turn;
      begin(false);
    }
  });
  text.addEventListener("input", () => read());
  text.addEventListener("mousemove", (event) => {
    text.style.pointerEvents = "none"; // what lies below is asked
    const below = document.elementFromPoint(event.clientX, event.clientY);
    text.style.pointerEvents = "";
    text.title = below && below.dataset && below.dataset.bits ? `${below.dataset.bits} bits` : "";
  });
  read();
}

if (typeof document !== "undefined") openPage();
