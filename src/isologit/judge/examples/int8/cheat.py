"""The plain entry with weights rounded to eight bits: the texts are nearly the same, the logits are not."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.append(str(Path(find_spec("isologit").origin).parent / "judge" / "examples" / "numpy"))

import server


class Rounded(server.Llama):
    def prepare(self):
        for name, weight in self.weights.items():
            if weight.ndim == 2:
                scale = np.abs(weight).max(axis=1, keepdims=True) / 127
                self.weights[name] = (np.round(weight / scale) * scale).astype(np.float32)


class Entry(server.Entry):
    model_class = Rounded


server.main(Entry)
