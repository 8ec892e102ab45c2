"""A CLIP of random weights, as open_clip reads it from `local-dir:`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from eval.metrics import weight_files as weights

TOWER = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.3, 0.4]


def tiny_clip(folder: Path) -> Path:
    import open_clip

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": TEXT}
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / weights.CLIP_CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(open_clip.model.CLIP(16, TOWER, TEXT).state_dict(), folder / weights.CLIP_FILES[0])
    return folder
