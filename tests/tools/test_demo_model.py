"""The demo model's tools: drawings, split, scorer, sheet, the scoring program, and the shipped folder."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from triptych.tools import score_shapes
from triptych.tools.shapes import contact_sheet, scenes, scoring
from triptych.tools.shapes.scenes import Scene

MODEL = Path(__file__).parents[2] / "examples" / "shapes"
SCENES = scenes.all_scenes()
BLUE = Scene("large", "red", "circle", "left", "blue")


def test_every_drawing_scores_full_marks() -> None:
    reach = (-scenes.JITTER, 0, scenes.JITTER)
    for index, scene in enumerate(SCENES):
        image = scenes.draw(scene, reach[index % 3], reach[index // 3 % 3])
        assert scoring.score(image, scene).perfect, (scene, scoring.detect(image))


@pytest.mark.parametrize("word", ["size", "colour", "shape", "place", "background"])
def test_each_wrong_property_is_caught_and_only_that(word: str) -> None:
    chooser = random.Random(3)
    tried = 0
    for scene in chooser.sample(SCENES, 150):
        others = [
            other
            for other in SCENES
            if getattr(other, word) != getattr(scene, word) and replace(other, **{word: getattr(scene, word)}) == scene
        ]
        other = chooser.choice(others)
        verdict = scoring.score(scenes.draw(other), scene)
        wrong = [field.name for field in fields(verdict) if not getattr(verdict, field.name)]
        assert wrong == [word], (scene, other)
        tried += 1
    assert tried == 150


def test_no_object_at_all_is_caught() -> None:
    plain = np.full((64, 64, 3), scenes.PALETTE["blue"], np.uint8)
    verdict = scoring.score(plain, BLUE)
    assert verdict == scoring.Score(background=True, colour=False, place=False, size=False, shape=False)


def test_noise_is_caught() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    verdict = scoring.score(noise, BLUE)
    assert not verdict.shape
    assert not verdict.background


def test_a_second_object_is_caught() -> None:
    both = np.maximum(scenes.draw(BLUE), scenes.draw(replace(BLUE, place="right")))
    assert not scoring.score(both, BLUE).shape


def test_a_smeared_shape_is_caught() -> None:
    smeared = Image.fromarray(scenes.draw(replace(BLUE, size="small", shape="triangle")))
    blurred = np.asarray(smeared.filter(ImageFilter.GaussianBlur(5)))
    assert not scoring.score(blurred, replace(BLUE, size="small", shape="triangle")).shape


def test_a_colour_between_two_names_has_none() -> None:
    image = scenes.draw(BLUE).astype(int)
    image[scenes.scene_coverage("large", "circle", "left") == 1.0] = (70, 90, 90)
    assert scoring.detect(image.astype(np.uint8)).colour == ""


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64 x 64"):
        scoring.detect(np.zeros((32, 32, 3), np.uint8))


def test_split_keeps_each_pair_of_words_in_training() -> None:
    held = scenes.held_out_triples()
    trained = {scene.triple for scene in scenes.training_scenes()}
    assert len(held) / (len(held) + len(trained)) == pytest.approx(scenes.HELD_OUT_SHARE, abs=0.01)
    assert not held & trained
    assert len(SCENES) == len(scenes.training_scenes()) + len(scenes.held_out_scenes())
    for colour, shape, ground in held:
        assert any((colour, other, ground) in trained for other in scenes.SHAPES)
        assert any((colour, shape, other) in trained for other in scenes.BACKGROUNDS)
        assert any((other, shape, ground) in trained for other in scenes.COLOURS)


def test_captions_are_unique_and_spell_out_the_scene() -> None:
    assert scenes.caption(BLUE) == "a large red circle on the left of a blue background"
    small = Scene("small", "green", "triangle", "centre", "white")
    assert scenes.caption(small) == "a small green triangle in the centre of a white background"
    assert len({scenes.caption(scene) for scene in SCENES}) == len(SCENES)


def test_varied_captions_mean_one_scene_and_use_known_words() -> None:
    chooser = random.Random(0)
    meanings: dict[str, Scene] = {}
    words = set(scenes.vocabulary())
    for scene in SCENES:
        for _ in range(8):
            text = scenes.varied_caption(scene, chooser)
            assert meanings.setdefault(text, scene) == scene, text
            assert set(text.split()) <= words


def test_prompts_are_held_out_distinct_first_and_repeatable() -> None:
    rows = score_shapes.choose_prompts(200, 1)
    assert rows == score_shapes.choose_prompts(200, 1)
    assert rows != score_shapes.choose_prompts(200, 2)
    assert all(scene.triple in scenes.held_out_triples() for scene, _ in rows)
    assert max(Counter(scene for scene, _ in rows).values()) == 2
    assert any(
        scene.triple not in scenes.held_out_triples()
        for scene, _ in score_shapes.choose_prompts(50, 1, held_out_only=False)
    )


def test_sheet_frames_wrong_images(tmp_path: Path) -> None:
    path = tmp_path / "out" / "sheet.png"
    contact_sheet.write_sheet(path, [scenes.draw(BLUE)] * 3, [True, False, True], columns=2)
    image = Image.open(path).convert("RGB")
    assert image.size == (2 * 68 + 4, 2 * 68 + 4)
    assert image.getpixel((4 + 68 - 2, 30)) == contact_sheet.WRONG
    assert image.getpixel((2, 30)) == contact_sheet.PAPER
    with pytest.raises(ValueError, match="verdict"):
        contact_sheet.write_sheet(path, [scenes.draw(BLUE)], [])


class FakeImageServer(BaseHTTPRequestHandler):
    """A server of ground-truth drawings: it answers as the image API does."""

    drawings: dict[str, Scene] = {scenes.caption(scene): scene for scene in SCENES}  # noqa: RUF012

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if wish.get("response_format") != "b64_json" or not isinstance(wish.get("seed"), int):
            self.send_error(422)
            return
        if self.path.startswith("/keyed/") and self.headers["authorization"] != "Bearer secret":
            self.send_error(401)
            return
        scene = self.drawings[wish["prompt"]]
        wrong = replace(scene, size="small") if self.path.startswith("/small/") else scene
        png = io.BytesIO()
        Image.fromarray(scenes.draw(wrong)).save(png, "PNG")
        body = json.dumps({"data": [{"b64_json": base64.b64encode(png.getvalue()).decode()}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), FakeImageServer)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join(10)
    http.server_close()


def run_score(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    assert score_shapes.main(list(arguments)) == 0
    last: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last


def test_score_through_a_server(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheet.png"
    result = run_score(capsys, "--prompts", "20", "--url", server, "--sheet", str(path))
    words = ("background", "colour", "place", "size", "shape")
    assert result == {**dict.fromkeys(words, 1.0), "prompts": 20, "held_out": 20}
    assert Image.open(path).size == (16 * 68 + 4, 2 * 68 + 4)


def test_score_sends_the_key_that_it_is_given(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIPTYCH_API_KEY", raising=False)
    (tmp_path / "key").write_text("secret\n")
    arguments = ["--prompts", "2", "--url", f"{server}/keyed", "--sheet", str(tmp_path / "s.png")]
    assert run_score(capsys, *arguments, "--key-file", str(tmp_path / "key"))["prompts"] == 2
    assert score_shapes.main(arguments) == 1
    assert "answered 401" in capsys.readouterr().err
    assert score_shapes.main([*arguments, "--key-file", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_score_counts_what_is_wrong(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheet.png"
    result = run_score(capsys, "--prompts", "40", "--url", f"{server}/small", "--sheet", str(path))
    large = sum(scene.size == "large" for scene, _ in score_shapes.choose_prompts(40, 1))
    assert result["size"] == 1 - large / 40
    assert result["shape"] == 1.0


def test_score_says_when_there_is_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeImageServer) as closed:
        port = closed.server_port
    arguments = ["--prompts", "2", "--url", f"http://127.0.0.1:{port}", "--sheet", str(tmp_path / "s.png")]
    assert score_shapes.main(arguments) == 1
    assert "is the server up?" in capsys.readouterr().err


def test_offsets_follow_the_noise_evenly() -> None:
    import torch

    from triptych.tools.shapes import flow

    noise = torch.randn(4000, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(flow.offsets_of(noise)[:, 0], minlength=flow.OFFSETS)
    assert counts.min() > 4000 / flow.OFFSETS * 0.8
    assert torch.equal(flow.offsets_of(noise[:5]), flow.offsets_of(noise)[:5])


def test_packing_is_undone_and_is_the_pipelines() -> None:
    import torch
    from diffusers import FluxPipeline

    from triptych.tools.shapes import model

    latents = torch.randn(2, 16, 8, 8)
    packed = model.pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 8, 8))
    assert torch.equal(model.unpack_latents(packed), latents)


def test_a_stopped_course_goes_on(tmp_path: Path) -> None:
    import torch

    from triptych.tools.shapes.training import TrainingRun, learning_rate

    def course(seconds: float) -> TrainingRun:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        return TrainingRun("try", tmp_path, seconds, layer, optimizer)

    first = course(1e9)
    for _ in first:
        first.learn(first.model(torch.ones(1, 2)).square().sum())
        if first.steps == 7:
            first.save()
            break
    second = course(1e9)
    assert second.steps == 7
    assert second.elapsed == first.elapsed
    assert torch.equal(second.model.weight, first.model.weight)
    assert torch.equal(second.average.model.weight, first.average.model.weight)
    moments = [course.optimizer.state_dict()["state"][0]["exp_avg"] for course in (first, second)]
    assert torch.equal(*moments)
    assert list(course(0.0)) == []
    assert learning_rate(1.0, 0.0) < learning_rate(1.0, 0.03) > learning_rate(1.0, 0.9) > 0


@pytest.mark.long
def test_training_saves_a_folder_that_paints_the_same(tmp_path: Path) -> None:
    import torch
    from diffusers import FluxPipeline

    from triptych.tools.shapes import autoencoder, flow, model

    cpu = torch.device("cpu")
    vae = autoencoder.train_autoencoder(0.2, cpu, 0)
    training_set = flow.make_training_set(vae, cpu, 0, SCENES[:4])
    assert training_set.latents.shape == (4, flow.OFFSETS, flow.OFFSETS, 16, 8, 8)
    assert training_set.tokens.shape == (4, flow.CAPTIONS_PER_SCENE, 16)
    painter = flow.train_denoiser(training_set, 0.2, cpu, 0)
    model.save_model(tmp_path, vae, painter)
    pipe = FluxPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    config = json.loads((tmp_path / "triptych.json").read_text())
    image = pipe(scenes.caption(SCENES[0]), generator=generator, **config["defaults"]).images[0]
    mine = flow.generate(painter, vae, [SCENES[0]], cpu, 3)[0]
    assert np.abs(np.asarray(image).astype(int) - mine).max() <= 3


def test_orthogonal_updates_have_singular_values_near_one() -> None:
    import torch

    from triptych.tools.shapes import optimizer

    matrices = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    for turned in (matrices, matrices.mT):
        values = torch.linalg.svdvals(optimizer.orthogonalize(turned))
        assert 0.5 < float(values.min()) < float(values.max()) < 1.5


def test_muon_goes_downhill_on_matrices_biases_and_words() -> None:
    import torch

    from triptych.tools.shapes import optimizer

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.Linear(8, 1))
    muon = optimizer.Muon(layers, 0.05)
    wanted = torch.tensor([[1.0], [-2.0], [3.0], [0.0]])
    for _ in range(200):
        muon.zero_grad()
        (layers(torch.arange(4)) - wanted).square().mean().backward()
        muon.step()
    assert float((layers(torch.arange(4)) - wanted).detach().abs().max()) < 0.2
    with pytest.raises(ValueError, match="closure"):
        muon.step(lambda: 0.0)


def test_shipped_model_is_small_and_has_its_serving_config() -> None:
    total = sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    assert total <= 8_000_000
    config = json.loads((MODEL / "triptych.json").read_text())
    assert config["defaults"]["num_inference_steps"] == 4
    assert config["defaults"]["max_sequence_length"] == 16


def test_shipped_model_paints_scenes_it_never_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheet.png"
    result = run_score(capsys, "--prompts", "12", "--model", str(MODEL), "--sheet", str(path))
    assert result["held_out"] == 12
    for word in ("background", "colour", "place", "size"):
        assert result[word] >= 11 / 12, result
    assert result["shape"] >= 10 / 12, result


def test_shipped_model_takes_unknown_words_and_lets_the_seed_decide() -> None:
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(seed)
        wish = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16}
        return np.asarray(pipe(prompt, generator=generator, **wish).images[0])

    prompt = "a large RED circle, on the left of a splendid blue background!"
    first = generate(prompt, 1)
    assert scoring.detect(first).colour == "red"
    assert np.array_equal(first, generate(prompt, 1))
    assert any(np.abs(first.astype(int) - generate(prompt, seed)).max() > 30 for seed in range(2, 8))
