// One decoding step of a language model, as its list of operations says: see kmixer.interop.operation_list.
"use strict";

const PANEL = 32; // columns of a weight that lie together
const STEPS = 32; // of the table, by unit
const FARTHEST = 8;

const whole = (size) => Math.ceil(size / PANEL) * PANEL;

// Phi(x), the distribution of the standard normal, and its density at 0, 1 / STEPS, ...: integrated by Simpson's rule.
const DISTRIBUTION = new Float64Array(FARTHEST * STEPS + 2);
const DENSITY = new Float64Array(FARTHEST * STEPS + 2);
{
  const density = (x) => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);
  const h = 1 / STEPS / 16;
  let sum = 0.5;
  for (let i = 0; i < DENSITY.length; ++i) {
    DENSITY[i] = density(i / STEPS);
    DISTRIBUTION[i] = sum;
    for (let j = 0; j < 8; ++j) {
      const x = i / STEPS + 2 * j * h;
      sum += (h / 3) * (density(x) + 4 * density(x + h) + density(x + 2 * h));
    }
  }
}

// Phi(x): between two entries of the table a cubic with their values and slopes, which is exact to 4e-9.
function distribution(x) {
  const distance = Math.abs(x);
  if (distance >= FARTHEST) return x > 0 ? 1 : 0;
  const i = Math.floor(distance * STEPS);
  const t = distance * STEPS - i;
  const rise = DISTRIBUTION[i + 1] - DISTRIBUTION[i];
  const from = DENSITY[i] / STEPS - rise;
  const to = rise - DENSITY[i + 1] / STEPS;
  const phi = DISTRIBUTION[i] + t * (rise + (1 - t) * (from * (1 - t) + to * t));
  return x > 0 ? phi : 1 - phi;
}

const gelu = (x) => x * distribution(x);
const erf = (x) => 2 * distribution(Math.SQRT2 * x) - 1;
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const logOfSum = (x, y) => Math.max(x, y) + Math.log1p(Math.exp(-Math.abs(x - y)));

function squares(x, count, from = 0) {
  let sum = 0;
  for (let i = from; i < from + count; ++i) sum += x[i] * x[i];
  return sum;
}

// What followed the last time the latest tokens were seen; of `memory` tokens the older half is forgotten together.
class Copies {
  constructor(memory) {
    this.memory = memory;
    this.tokens = [];
    this.equal = []; // of every token but the newest, how many up to there are those up to the newest
  }

  push(token) {
    const { tokens, equal } = this;
    if (tokens.length === this.memory) {
      const half = this.memory / 2;
      tokens.splice(0, half);
      equal.splice(0, half);
      for (let i = 0; i < equal.length; ++i) equal[i] = Math.min(equal[i], i + 1);
    }
    let length = 0;
    let latest = -1;
    for (let i = tokens.length - 1; i >= 0; --i) {
      equal[i] = tokens[i] === token ? (i > 0 ? equal[i - 1] : 0) + 1 : 0;
      if (equal[i] > length) {
        length = equal[i];
        latest = i;
      }
    }
    tokens.push(token);
    return { copied: length ? tokens[latest + 1] : -1, length };
  }

  copy() {
    const other = new Copies(this.memory);
    other.tokens = this.tokens.slice();
    other.equal = this.equal.slice();
    return other;
  }
}

// A model at a position of a text. `model` is the list of operations, `bytes` an ArrayBuffer with all of its arrays.
class Step {
  constructor(model, bytes) {
    this.model = model;
    this.operations = model.operations.map((operation) => {
      const arrays = {};
      for (const [name, array] of Object.entries(operation.arrays)) arrays[name] = numbersOf(bytes, array);
      return { ...operation, ...arrays };
    });
    this.buffers = model.buffers.map((width) => new Float32Array(whole(width)));
    this.sums = new Float64Array(PANEL);
    this.restore(null);
  }

  // Where the text stands: given back to `restore`, or null for its beginning.
  state() {
    return { mixed: this.mixed.map((part) => part.slice()), copies: this.copies.copy() };
  }

  restore(state) {
    if (state) {
      this.mixed = state.mixed.map((part) => part.slice());
      this.copies = state.copies.copy();
      return;
    }
    this.copies = new Copies(this.model.memory);
    this.mixed = this.operations
      .filter((operation) => operation.kind === "mix")
      .map((mix) => new Float32Array((mix.rank + Math.max(0, mix.lags - 1)) * whole(mix.inputs)));
  }

  // Logits after one token more; they are overwritten by the next call.
  advance(token) {
    let mixing = 0;
    for (const op of this.operations) {
      const from = this.buffers[op.input];
      const to = this.buffers[op.output];
      switch (op.kind) {
        case "embed":
          to.set(op.weight.subarray(token * op.inputs, (token + 1) * op.inputs));
          break;
        case "linear":
          this.linear(op, from, to);
          break;
        case "norm": {
          const scale = 1 / Math.sqrt(squares(from, op.inputs) / op.inputs + op.eps);
          for (let j = 0; j < op.inputs; ++j) to[j] = op.weight[j] * from[j] * scale;
          break;
        }
        case "pointwise": {
          const bounded = op.activation === "erf" ? erf : Math.tanh;
          const [alpha, shift] = op.extra;
          for (let j = 0; j < op.inputs; ++j) {
            const value = op.weight[j] * bounded(alpha * from[j] + shift) + op.bias[j];
            to[j] = op.residual < 0 ? value : from[j] + value;
          }
          break;
        }
        case "mix":
          this.mix(op, from, this.buffers[op.queries], to, this.mixed[mixing++]);
          break;
        case "read_out": {
          const scale = 1 / Math.sqrt(squares(from, op.inputs) / op.inputs + op.eps);
          for (let j = 0; j < op.inputs; ++j) to[j] = from[j] + op.extra[j] * op.weight[j] * from[j] * scale + op.bias[j];
          break;
        }
        case "refine":
          for (let j = 0; j < op.inputs; ++j) to[j] += op.extra[0] * (from[j] - to[j]);
          break;
        case "remember": {
          const { copied, length } = this.copies.push(token);
          this.copied = copied;
          this.bucket = op.extra.filter((start) => length >= start).length;
          for (let j = 0; j < op.inputs; ++j) {
            const vector = op.weight[(copied + 1) * op.inputs + j];
            to[j] = vector + (op.bias ? op.bias[this.bucket * op.inputs + j] : 0);
          }
          break;
        }
        case "copy":
          for (let j = 0; j < op.inputs; ++j) to[j] += op.weight[this.bucket] * from[j];
          break;
        case "point":
          this.point(op, from, to);
          break;
      }
    }
    return this.buffers[this.model.logits].subarray(0, this.model.vocabulary);
  }

  // Weights lie in panels of 32 columns: of every input a row, and the biases last.
  linear(op, from, to) {
    const { sums } = this;
    const { weight } = op;
    const residual = op.residual < 0 ? null : this.buffers[op.residual];
    let at = 0;
    for (let column = 0; column < op.outputs; column += PANEL) {
      sums.set(weight.subarray(at + op.inputs * PANEL, at + (op.inputs + 1) * PANEL));
      let i = 0;
      for (; i + 4 <= op.inputs; i += 4, at += 4 * PANEL) {
        const [x0, x1, x2, x3] = [from[i], from[i + 1], from[i + 2], from[i + 3]];
        for (let j = at; j < at + PANEL; ++j) {
          sums[j - at] += x0 * weight[j] + x1 * weight[j + PANEL] + x2 * weight[j + 2 * PANEL] + x3 * weight[j + 3 * PANEL];
        }
      }
      for (; i < op.inputs; ++i, at += PANEL) {
        for (let j = 0; j < PANEL; ++j) sums[j] += from[i] * weight[at + j];
      }
      at += PANEL;
      const end = Math.min(PANEL, op.outputs - column);
      for (let j = 0; j < end; ++j) {
        const sum = sums[j] + (residual ? residual[column + j] : 0);
        if (op.activation === "gelu") to[column + j] = gelu(sum);
        else if (op.activation === "gate") to[column + j] *= sum * sigmoid(sum);
        else to[column + j] = sum;
      }
    }
  }

  // y = sum_c alpha_c q_c S_c + filter, after S = g S + k x; queries and keys at unit length.
  mix(op, x, queries, y, mixed) {
    const wide = whole(op.inputs);
    const start = op.rank * wide; // of the inputs before this one, the oldest first
    const past = Math.max(0, op.lags - 1);
    const key = op.wide_rank;
    const queryScale = 1 / Math.max(Math.sqrt(squares(queries, op.rank)), op.eps);
    const keyScale = 1 / Math.max(Math.sqrt(squares(queries, op.rank, key)), op.eps);
    const tap = op.lags ? op.extra[0] : 0;
    for (let j = 0; j < op.inputs; ++j) y[j] = tap * x[j];
    for (let c = 0; c < op.rank; ++c) {
      const q = op.bias[c] * queries[c] * queryScale;
      const k = queries[key + c] * keyScale;
      const decay = op.weight[c];
      for (let j = 0, at = c * wide; j < op.inputs; ++j, ++at) {
        mixed[at] = decay * mixed[at] + k * x[j];
        y[j] += q * mixed[at];
      }
    }
    for (let i = 0; i < past; ++i) {
      for (let j = 0; j < op.inputs; ++j) y[j] += op.extra[past - i] * mixed[start + i * wide + j];
    }
    if (past) {
      mixed.copyWithin(start, start + wide, start + past * wide);
      mixed.set(x.subarray(0, wide), start + (past - 1) * wide);
    }
  }

  // log((1 - g) softmax(logits) + g onehot(copied)) in the place of the logits.
  point(op, hidden, logits) {
    let share = op.bias[this.bucket];
    for (let j = 0; j < op.inputs; ++j) share += op.weight[j] * hidden[j];
    const rest = logOfAll(logits, op.outputs) + (this.copied < 0 ? 0 : logOfSum(share, 0));
    for (let j = 0; j < op.outputs; ++j) logits[j] -= rest;
    if (this.copied >= 0) logits[this.copied] = logOfSum(logits[this.copied], -logOfSum(-share, 0));
  }
}

function logOfAll(logits, count = logits.length) {
  let highest = -Infinity;
  for (let j = 0; j < count; ++j) highest = Math.max(highest, logits[j]);
  let sum = 0;
  for (let j = 0; j < count; ++j) sum += Math.exp(logits[j] - highest);
  return highest + Math.log(sum);
}

// An array of the file: numbers of 32 bits as they lie, those of 16 bits made into such of 32.
function numbersOf(bytes, { at, count, half }) {
  if (!half) return new Float32Array(bytes, at, count);
  const numbers = new Float32Array(count);
  const halves = new Uint16Array(bytes, at, count);
  for (let i = 0; i < count; ++i) {
    const exponent = (halves[i] >> 10) & 31;
    const fraction = halves[i] & 1023;
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    numbers[i] = halves[i] >> 15 ? -size : size;
  }
  return numbers;
}
