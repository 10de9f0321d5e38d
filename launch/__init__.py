"""The main job: train a byte-level decoder on a sequence that is spread over all ranks. Entry: `launch/train.py`."""
