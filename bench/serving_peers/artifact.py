"""Write the bench's model artifact, its release and its pictures."""

from __future__ import annotations

import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from airloom.contract import Release, sha256_tree

CODE = Path(__file__).parent / "resnet_model.py"
PICTURES = 32


def make_bundle(root: Path) -> Path:
    """A release bundle as `airloom` lays it out: `<root>/bench/1.0.0/{model,release.json}`."""
    import torch

    from bench.serving_peers.resnet_model import CLASSES, SmallResNet

    bundle = root / "bench" / "1.0.0"
    model = bundle / "model"
    (model / "code").mkdir(parents=True)
    (model / "weights").mkdir()
    shutil.copy(CODE, model / "code" / "resnet_model.py")
    torch.manual_seed(7)
    torch.save(SmallResNet().state_dict(), model / "weights" / "weights.pt")
    card = {
        "entry": "resnet_model:load",
        "packages": ["resnet_model"],
        "task": "classification",
        "classes": CLASSES,
        "media_types": ["image/png", "image/jpeg"],
    }
    (model / "model.json").write_text(json.dumps(card))
    Release(
        pipeline="bench",
        version="1.0.0",
        created_at=datetime.now(UTC),
        run_id="bench",
        model_name="bench",
        model_version="1",
        model_uri="models:/m-bench",
        model_digest=sha256_tree(model),
        mlflow_run_id="0" * 32,
        data_tag="bench/CV_bench_01234567_DV_20261121T000000000Z",
        data_md5="0" * 32 + ".dir",
        serving_repo="ds_modelserving",
        serving_commit="0" * 40,
        environment="0" * 64,
        plan="s3://airloom/runs/bench/plan.json",
        lineage={},
    ).write(bundle / "release.json")
    return bundle


def make_pictures() -> list[bytes]:
    """64 x 64 JPEG pictures, all different, about 2 kB each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(7)
    pictures = []
    for _ in range(PICTURES):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    return pictures
