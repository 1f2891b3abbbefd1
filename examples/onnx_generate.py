"""Text from `kmixer export RUN --out FOLDER`, without torch: python onnx_generate.py FOLDER "To be" 400 [SEED]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Copies:
    """What followed the last time the latest tokens were seen, for a model with a copy memory.

    `equal` says of every token but the newest how many tokens up to there are those up to the newest.
    """

    def __init__(self, memory):
        self.memory = memory
        self.tokens = np.zeros(0, np.int64)
        self.equal = np.zeros(0, np.int64)

    def __call__(self, token):
        """Remember a token; what it copies, or -1, and the length of the match, or 0."""
        if len(self.tokens) == self.memory:  # the older half is forgotten
            half = self.memory // 2
            self.tokens = self.tokens[half:]
            self.equal = np.minimum(self.equal[half:], np.arange(1, half))
        one_before = np.append(0, self.equal)[: len(self.tokens)]
        self.equal = np.where(self.tokens == token, one_before + 1, 0)
        self.tokens = np.append(self.tokens, token)
        length = int(self.equal.max(initial=0))
        if length == 0:
            return -1, 0
        latest = np.flatnonzero(self.equal == length)[-1]
        return int(self.tokens[latest + 1]), length


def main(folder, prompt, new_tokens, seed=None):
    step = json.loads((Path(folder) / "step.json").read_text())
    characters = json.loads((Path(folder) / "tokenizer.json").read_text())["characters"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one token is too little work to share
    session = onnxruntime.InferenceSession(str(Path(folder) / step["file"]), options)
    random = np.random.default_rng(int(seed) if seed else None)
    copies = Copies(step["copy_memory"]["memory"]) if "copy_memory" in step else None

    # The state before the first token: zeros, "b" = 1 sequence.
    state = {part["input"]: np.zeros([1, *part["shape"][1:]], np.float32) for part in step["state"]}
    text = prompt
    for position in range(len(prompt) + int(new_tokens) - 1):
        token = characters.index(text[position])
        feeds = {"token": np.array([[token]]), **state}
        if copies:
            copied, length = copies(token)
            feeds |= {"copied": np.array([[copied]]), "length": np.array([[length]])}
        logits, *after = session.run(None, feeds)
        state = dict(zip(state, after, strict=True))
        if position == len(text) - 1:  # the prompt is read: draw the next character at temperature 0.8
            weights = np.exp((logits[0] - logits.max()).astype(np.float64) / 0.8)
            text += characters[random.choice(len(characters), p=weights / weights.sum())]
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
