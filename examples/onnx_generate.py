"""Text from `kmixer export RUN --out FOLDER`, without torch: python onnx_generate.py FOLDER "To be" 400 [SEED]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder, prompt, new_tokens, *seed = sys.argv[1:]
step = json.loads((Path(folder) / "step.json").read_text())
characters = json.loads((Path(folder) / "tokenizer.json").read_text())["characters"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # one token is too little work to share
session = onnxruntime.InferenceSession(str(Path(folder) / step["file"]), options)
random = np.random.default_rng(int(seed[0]) if seed else None)

# The state before the first token: zeros, "b" = 1 sequence.
state = {part["input"]: np.zeros([1, *part["shape"][1:]], np.float32) for part in step["state"]}
text = prompt
for position in range(len(prompt) + int(new_tokens) - 1):
    token = np.array([[characters.index(text[position])]])
    logits, *after = session.run(None, {"token": token, **state})
    state = dict(zip(state, after, strict=True))
    if position == len(text) - 1:  # the prompt is read: draw the next character at temperature 0.8
        weights = np.exp((logits[0] - logits.max()).astype(np.float64) / 0.8)
        text += characters[random.choice(len(characters), p=weights / weights.sum())]
print(text)
