// Text to tokens and back: characters, bytes and byte pairs as kmixer.data.tokenizers has them.
"use strict";

// As the byte-level splitter of byte pairs has it: contractions, words, numbers, other signs with a blank before them.
const WORD = new RegExp(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+|" +
    "\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
  "gu",
);

function openTokenizer(description) {
  return new { char: Characters, byte: Bytes, bpe: BytePairs }[description.kind](description);
}

class Characters {
  constructor({ characters }) {
    this.characters = Array.from(characters);
    this.token = new Map(this.characters.map((character, token) => [character, token]));
  }

  // The tokens of a text; throws an Error that names characters without a token.
  encode(text) {
    const characters = Array.from(text);
    const unknown = new Set(characters.filter((character) => !this.token.has(character)));
    if (unknown.size) throw new Error("this model does not know " + Array.from(unknown, (c) => JSON.stringify(c)).join(", "));
    return characters.map((character) => this.token.get(character));
  }

  // A function from a token to the text that it completes.
  decoder() {
    return (token) => this.characters[token];
  }
}

class Bytes {
  encode(text) {
    return Array.from(new TextEncoder().encode(text));
  }

  decoder() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (token) => decoder.decode(this.bytes(token), { stream: true });
  }

  bytes(token) {
    return Uint8Array.of(token);
  }
}

class BytePairs extends Bytes {
  // pieces: the bytes of every token, as numbers; merges: [left, right, token] in their order; bounded: a pattern that
  // cuts words, or null.
  constructor({ pieces, merges, bounded }) {
    super();
    this.pieces = pieces.map((piece) => Uint8Array.from(piece));
    this.token = new Map(pieces.map((piece, token) => [piece.length === 1 ? piece[0] : -1 - token, token]));
    this.merges = new Map(merges.map(([left, right, token], rank) => [left * pieces.length + right, { rank, token }]));
    this.bounded = bounded && new RegExp(bounded, "gu");
  }

  encode(text) {
    const parts = this.bounded ? text.match(this.bounded) || [] : [text];
    const words = parts.flatMap((part) => part.match(WORD) || []);
    return words.flatMap((word) => this.merged(Array.from(new TextEncoder().encode(word), (byte) => this.token.get(byte))));
  }

  // One word: the pair that was learned first is joined first.
  merged(tokens) {
    for (;;) {
      let best = null;
      let at = -1;
      for (let i = 0; i + 1 < tokens.length; ++i) {
        const merge = this.merges.get(tokens[i] * this.pieces.length + tokens[i + 1]);
        if (merge && (!best || merge.rank < best.rank)) {
          best = merge;
          at = i;
        }
      }
      if (!best) return tokens;
      tokens.splice(at, 2, best.token);
    }
  }

  bytes(token) {
    return this.pieces[token];
  }
}
