"""The model artifact: loads with its own code alone, and does to a request what training did to a row."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from modeling_samples import CLASSES, PARAMS, REPO, SIZE, picture
from PIL import Image

from airloom.contract import sha256_tree
from airloom.contract.model import load_predictor
from airloom.contract.predictor import InputRejectedError, predict_items
from airloom.contract.shards import read_split
from modeling.data import load_examples


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_served_tensor_is_the_training_tensor(model: Path, dataset: Path, split: str) -> None:
    _, predictor = load_predictor(model)
    examples = load_examples(dataset, split, predictor.config)
    contents = read_split(dataset, split, ["image"])["image"].to_pylist()
    assert len(contents) == len(examples) > 0
    for content, tensor in zip(contents, examples.images, strict=True):
        assert np.array_equal(predictor.transform(predictor.decode(content)), tensor.numpy())


def test_it_loads_in_a_fresh_process_without_this_repo(model: Path, tmp_path: Path) -> None:
    script = """
import json, pathlib, sys
from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items
folder, picture = map(pathlib.Path, sys.argv[1:])
card, predictor = load_predictor(folder)
foreign = sorted(name for name in ("modeling", "mlflow", "pyarrow", "matplotlib") if name in sys.modules)
print(json.dumps({"output": predict_items(predictor, [picture.read_bytes()])[0], "foreign": foreign}))
"""
    content = picture("box", 5000)
    (tmp_path / "picture.png").write_bytes(content)
    before = sha256_tree(model)
    command = [sys.executable, "-I", "-c", script, str(model), str(tmp_path / "picture.png")]
    said = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    assert said == {"output": predict_items(load_predictor(model)[1], [content])[0], "foreign": []}
    assert sha256_tree(model) == before, "loading must write nothing into the artifact"


def test_mlflow_loads_it_too(model: Path) -> None:
    import mlflow.pyfunc

    content = picture("flat", 5001)
    _, predictor = load_predictor(model)
    path = list(sys.path)
    try:
        loaded = mlflow.pyfunc.load_model(str(model))
    finally:
        sys.path[:] = path
    assert loaded.predict([content]) == predict_items(predictor, [content])


def test_two_versions_of_the_code_live_side_by_side(model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model, other)
    code = other / "code" / "image_classifier" / "predictor.py"
    code.write_text(code.read_text().replace("self.config.classes[best],", "'always this',", 1))
    _, first = load_predictor(model)
    _, second = load_predictor(other)
    content = picture("box", 5002)
    assert predict_items(second, [content])[0]["label"] == "always this"
    assert predict_items(first, [content])[0]["label"] in CLASSES


def test_an_answer_names_label_and_probabilities(model: Path) -> None:
    card, predictor = load_predictor(model)
    assert card.classes == CLASSES
    output = predict_items(predictor, [picture("box", 5003)])[0]
    assert output["label"] == max(output["probabilities"], key=output["probabilities"].get)
    assert output["probability"] == output["probabilities"][output["label"]]
    assert sum(output["probabilities"].values()) == pytest.approx(1, abs=0.001)
    json.dumps(output)


def test_the_batch_does_not_change_an_answer(model: Path) -> None:
    _, predictor = load_predictor(model)
    contents = [picture(CLASSES[number % 3], 6000 + number) for number in range(32)]
    assert predict_items(predictor, contents) == [predict_items(predictor, [content])[0] for content in contents]


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", picture("box", 1)[:40], picture("box", 1)[:-30]],
    ids=["empty", "text", "header", "truncated"],
)
def test_a_bad_upload_is_rejected_with_a_message_for_its_sender(model: Path, content: bytes) -> None:
    _, predictor = load_predictor(model)
    with pytest.raises(InputRejectedError) as caught:
        predictor.decode(content)
    assert str(caught.value)
    assert "/" not in str(caught.value).replace("image/", "")


def test_a_large_colour_photo_is_taken(model: Path) -> None:
    _, predictor = load_predictor(model)
    buffer = io.BytesIO()
    Image.effect_noise((640, 480), 50).convert("RGB").save(buffer, format="JPEG")
    assert predictor.transform(predictor.decode(buffer.getvalue())).shape == (1, SIZE, SIZE)


def test_embeddings_are_one_vector_for_each_row(model: Path) -> None:
    _, predictor = load_predictor(model)
    batch = np.stack([predictor.transform(predictor.decode(picture("box", seed))) for seed in range(5)])
    vectors = predictor.embed(batch)
    assert vectors.shape == (5, 4 * PARAMS["width"])
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == 5


def test_explain_is_a_picture_that_depends_on_the_sample(model: Path) -> None:
    _, predictor = load_predictor(model)
    pictures = [predictor.explain(predictor.decode(picture(label, 5004))) for label in ("box", "flat")]
    for content in pictures:
        shown = Image.open(io.BytesIO(content))
        shown.load()
        assert (shown.format, shown.mode) == ("PNG", "RGB")
        assert shown.width == 2 * shown.height + 8
    assert pictures[0] != pictures[1]


def test_the_carried_code_is_this_repos_code(model: Path) -> None:
    carried = model / "code" / "image_classifier"
    ours = REPO / "image_classifier"
    assert {p.name: p.read_bytes() for p in carried.glob("*")} == {p.name: p.read_bytes() for p in ours.glob("*.py")}
